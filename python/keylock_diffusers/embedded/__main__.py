"""``python -m keylock_diffusers.embedded``: make the embedded base model again.

    render      look at what it is trained on
    autoencoder, diffusion, classifier
                train one part, or go on from its checkpoint
    export      write the pipeline's files
    evaluate    draw the contact sheet and measure it

Needs Debian's fonts-noto-color-emoji. Checkpoints go to a working folder; the exported model and the
classifier go to the package's assets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import BASE_MODEL, autoencoder, classifier, diffusion, evaluate, load, render


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m keylock_diffusers.embedded", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "stage", choices=("render", "autoencoder", "diffusion", "classifier", "export", "evaluate", "all")
    )
    parser.add_argument("--folder", type=Path, default=Path(".work/embedded"), help="checkpoints and pictures")
    parser.add_argument("--steps", type=int, help="steps in all of the stage's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from-export", action="store_true", help="without a checkpoint, go on from the exported model's weights"
    )
    arguments = parser.parse_args()
    folder, steps = arguments.folder, {"steps": arguments.steps} if arguments.steps else {}
    start = load() if arguments.from_export else None
    folder.mkdir(parents=True, exist_ok=True)
    stages = ("autoencoder", "diffusion", "classifier", "export", "evaluate")
    for stage in stages if arguments.stage == "all" else (arguments.stage,):
        if stage == "render":
            pictures = [render.draw(arguments.seed, n).image for n in range(128)]
            rows = [np.concatenate(pictures[n : n + 16], axis=1) for n in range(0, 128, 16)]
            Image.fromarray(np.concatenate(rows)).save(folder / "renders.png")
            print(folder / "renders.png")
        elif stage == "autoencoder":
            autoencoder.train(folder, start=start and start.vae, seed=arguments.seed, **steps)
        elif stage == "diffusion":
            vae = autoencoder.build(arguments.seed) if start is None else start.vae
            diffusion.train(folder, vae, start=start, seed=arguments.seed, **steps)
        elif stage == "classifier":
            classifier.train(folder, **steps)
        elif stage == "export":
            size = diffusion.export(diffusion.assemble(folder, arguments.seed), BASE_MODEL)
            print(f"{BASE_MODEL}: {size / 2**20:.1f} MiB")
        else:
            sheets = evaluate.draw_sheet(load())
            evaluate.contact_sheet(sheets[0]).save(folder / "contact-sheet.png")
            measured = evaluate.measure(sheets)
            (folder / "evaluation.json").write_text(json.dumps(measured, indent=1))
            print(json.dumps({key: value for key, value in measured.items() if key != "wrong"}))


if __name__ == "__main__":
    main()
