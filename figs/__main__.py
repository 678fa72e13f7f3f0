"""Draw every figure into this folder: python -m figs."""

from pathlib import Path

from figs import attention, flow, pretraining, siamese, transformer

FIGURES = {
    "siamese": siamese.draw,
    "transformer": transformer.draw,
    "attention": attention.draw_standard,
    "disentangled_attention": attention.draw_disentangled,
    "replaced_token_detection": pretraining.draw,
    "data_flow": flow.draw,
}


def main(folder: Path = Path(__file__).parent) -> None:
    """Write NAME.svg and NAME.png of each figure."""
    for name, draw in FIGURES.items():
        draw().save(folder / name)
        print(f"figs/{name}.svg, .png")


if __name__ == "__main__":
    main()
