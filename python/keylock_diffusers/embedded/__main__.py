"""``python -m keylock_diffusers.embedded``: make the embedded base model again.

    render      look at what it is trained on
    classifier, autoencoder, diffusion, image-encoder, adapter
                train one part, or go on from its checkpoint
    export      write the pipeline's files
    export-adapter
                write the image prompt adapter and its encoder
    evaluate    draw the contact sheet and measure it

Needs Debian's fonts-noto-color-emoji. Checkpoints go to a working folder; what is exported and the classifier go to
the package's assets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers import AutoencoderTiny
from PIL import Image

from keylock_diffusers.training.image_adapter import ImageAdapter

from . import (
    ADAPTER,
    ADAPTER_FILE,
    BASE_MODEL,
    adapter,
    autoencoder,
    classifier,
    diffusion,
    evaluate,
    image_encoder,
    load,
    render,
)

STAGES = (
    "classifier", "autoencoder", "diffusion", "export", "image-encoder", "adapter", "export-adapter", "evaluate"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m keylock_diffusers.embedded", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("render", *STAGES, "all"))
    parser.add_argument("--folder", type=Path, default=Path(".work/embedded"), help="checkpoints and pictures")
    parser.add_argument("--steps", type=int, help="steps in all of the stage's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=float, help="share of two subjects in the pictures of the diffusion stage")
    parser.add_argument("--learning-rate", type=float, help="of the diffusion stage")
    parser.add_argument(
        "--from-export", action="store_true", help="without a checkpoint, go on from the exported model's weights"
    )
    arguments = parser.parse_args()
    folder, steps = arguments.folder, {"steps": arguments.steps} if arguments.steps else {}
    diffused = {name: getattr(arguments, name) for name in ("pairs", "learning_rate")}
    diffused = steps | {name: value for name, value in diffused.items() if value is not None}
    start = load() if arguments.from_export else None
    folder.mkdir(parents=True, exist_ok=True)

    def encoder() -> AutoencoderTiny:
        return autoencoder.build(arguments.seed) if start is None else start.vae

    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        if stage == "render":
            pictures = [render.draw(arguments.seed, n).image for n in range(128)]
            rows = [np.concatenate(pictures[n : n + 16], axis=1) for n in range(0, 128, 16)]
            Image.fromarray(np.concatenate(rows)).save(folder / "renders.png")
            print(folder / "renders.png")
        elif stage == "autoencoder":
            autoencoder.train(folder, start=start and start.vae, seed=arguments.seed, **steps)
        elif stage == "diffusion":
            diffusion.train(folder, encoder(), start=start, seed=arguments.seed, **diffused)
        elif stage == "classifier":
            classifier.train(folder, **steps)
        elif stage == "image-encoder":
            image_encoder.train(folder, **steps)
        elif stage == "adapter":
            begun = ImageAdapter.load(ADAPTER / ADAPTER_FILE, load().unet) if arguments.from_export else None
            config = replace(adapter.CONFIG, **steps)
            adapter.train(folder, load(), image_encoder.restore(folder), config=config, start=begun)
        elif stage == "export-adapter":
            print(f"{ADAPTER}: {adapter.export(folder) / 2**20:.1f} MiB")
        elif stage == "export":
            size = diffusion.export(diffusion.assemble(folder, encoder()), BASE_MODEL)
            print(f"{BASE_MODEL}: {size / 2**20:.1f} MiB")
        else:
            measured, sheet = evaluate.measure(load())
            evaluate.contact_sheet(sheet).save(folder / "contact-sheet.png")
            (folder / "evaluation.json").write_text(json.dumps(measured, indent=1) + "\n")
            print({name: {k: v for k, v in one.items() if k != "wrong"} for name, one in measured.items()})


if __name__ == "__main__":
    main()
