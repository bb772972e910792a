"""`python -m resvariants`: the networks by name. `python -m resvariants NAME`: what is in one."""

import sys

from resvariants.errors import InputError
from resvariants.networks.summary import format_summary
from resvariants.networks.zoo import find, list_models


def main(names: list[str]) -> None:
    """Prints summaries of the named networks, or the list of all by families."""
    for name in names:
        entry = find(name)
        print(f"{name}: {entry.paper}")
        print(format_summary(entry.build(num_classes=entry.num_classes), entry.image_shape))
    if not names:
        for family, entries in list_models().items():
            print(f"\n{family}")
            for name, entry in entries.items():
                image = "x".join(map(str, entry.image_shape))
                print(
                    f"  {name:34}{entry.parameters:>12,} parameters  {image:10}  {entry.paper}",
                    flush=True,
                )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
