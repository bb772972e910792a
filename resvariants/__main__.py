"""`python -m resvariants`: the networks by name. `python -m resvariants NAME`: what is in one."""

import sys

from resvariants.errors import InputError
from resvariants.summary import abstract_variables, count_parameters, format_summary
from resvariants.zoo import ZOO, find


def main(names: list[str]) -> None:
    """Prints summaries of the named networks, or the list of all."""
    for name in names:
        entry = find(name)
        print(f"{name}: {entry.paper}")
        print(format_summary(entry.build(num_classes=entry.num_classes), entry.image_shape))
    if not names:
        for name, entry in ZOO.items():
            model = entry.build(num_classes=entry.num_classes)
            params = count_parameters(abstract_variables(model, entry.image_shape)["params"])
            image = "x".join(map(str, entry.image_shape))
            print(f"{name:18}{params:>12,} parameters  {image:10}  {entry.paper}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
