"""`python -m resvariants`: the networks by name. `python -m resvariants NAME`: what is in one."""

import argparse
import json
import sys
from pathlib import Path

from resvariants.errors import InputError, check_choice
from resvariants.networks import summary
from resvariants.networks.zoo import find, list_models
from resvariants.registers import import_modules, made

# Parameters of all networks, traced ahead: tracing them takes a minute. A test compares.
SIZES = Path(__file__).parent / "networks" / "sizes.json"


def main(arguments: list[str]) -> None:
    """Prints summaries of the named networks, or the list of all by families."""
    parser = argparse.ArgumentParser(prog="python -m resvariants", description=__doc__)
    parser.add_argument("names", nargs="*", help="networks to show part by part")
    parser.add_argument("--family", help="list one family alone, such as DenseNet")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument(
        "--modules", nargs="+", action="extend", default=[], help="of your own, with more networks"
    )
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    import_modules(args.modules)
    families = list_models()
    if args.trace:
        sizes = {name: e.parameters for entries in families.values() for name, e in entries.items()}
        SIZES.write_text(json.dumps(sizes, indent=0) + "\n")
    if args.family is not None:
        families = {args.family: families[check_choice("family", args.family, families)]}
    if args.names and args.json:
        parts = {name: _of(name, summary.summarise) for name in args.names}
        print(json.dumps(parts, indent=1))
    elif args.names:
        for name in args.names:
            print(f"{name}: {find(name).paper}\n{_of(name, summary.format_summary)}")
    else:
        _list(families, args.json)


def _of(name, summarised):
    entry = find(name)

    def summary_of():
        return summarised(entry.build(num_classes=entry.num_classes), entry.image_shape)

    return made(f"the summary of {name}", summary_of)


def _list(families, as_json):
    sizes = json.loads(SIZES.read_text())
    facts = {
        name: {
            "family": family,
            "parameters": sizes.get(name)
            or made(f"model {name}", lambda entry=entry: entry.parameters),
            "image_shape": entry.image_shape,
            "num_classes": entry.num_classes,
            "paper": entry.paper,
        }
        for family, entries in families.items()
        for name, entry in entries.items()
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    family = None
    for name, fact in facts.items():
        if fact["family"] != family:
            family = fact["family"]
            print(f"\n{family}")
        image = "x".join(map(str, fact["image_shape"]))
        print(f"  {name:34}{fact['parameters']:>12,} parameters  {image:10}  {fact['paper']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
