"""DINO, CLIP-I and CLIP-T on DreamBench's folders, with models of one's own.

    python -m benchmarks.quality.dreambench DATA OUTPUT --model sd15 --clip clip-vit-base-patch32 --dino dino-vits16

``DATA`` has a folder of pictures for each subject, and DreamBooth's ``prompts_and_classes.txt``. What was learned and
drawn lies in ``OUTPUT``; it is not made again.

Paper: Ruiz et al., DreamBooth, arXiv 2208.12242.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import keylock_diffusers as kd
from keylock_diffusers.concepts import Concept
from keylock_diffusers.loras import ModelShapes, read_adapter, write_adapter, write_word
from keylock_diffusers.training import (
    AddedConfig,
    LoraTrainingConfig,
    PerfusionConfig,
    PictureFolder,
    covariance,
    train_concepts,
    train_loras,
)

FILE = "prompts_and_classes.txt"
METHODS = ("added", "perfusion", "lora")
_PROMPT = re.compile(r"'([^'\n]*\{0\} \{1\}[^'\n]*)'\.format")
_CLASS = re.compile(r"^([a-z0-9_]+),([a-z][a-z ]*)$", re.MULTILINE)
_LIVE = ("cat", "dog")


@dataclass(frozen=True)
class Task:
    """One subject of DreamBench.

    Args:
        name: of its folder.
        kind: the super-class.
        prompts: what is drawn; {} is where the subject is named.
    """

    name: str
    kind: str
    prompts: tuple[str, ...]

    @property
    def placeholder(self) -> str:
        return f"<{self.name.replace('_', '-')}>"


def tasks(data: Path) -> list[Task]:
    """The subjects of a folder.

    Raises:
        ValueError: the file of classes and prompts is not like DreamBooth's, or names folders that are not there.
    """
    text = (data / FILE).read_text()
    first, _, second = text.partition("Live Subject Prompts")
    lists = [tuple(p.replace("{0} {1}", "{}") for p in _PROMPT.findall(part)) for part in (first, second)]
    classes = [(name, kind) for name, kind in _CLASS.findall(text) if name != "subject_name"]
    if not all(lists) or not classes:
        raise ValueError(f"{data / FILE} must hold classes, object prompts and live subject prompts")
    absent = [name for name, _ in classes if not (data / name).is_dir()]
    if absent:
        raise ValueError(f"{data} must hold a folder for each subject of {FILE}, got none for {', '.join(absent[:3])}")
    return [Task(name, kind, lists[kind in _LIVE]) for name, kind in classes]


class Likeness:
    """How alike pictures and words are, by models read through transformers.

    Args:
        clip: folder of a CLIP model with its processor.
        dino: folder of a vision transformer with its image processor.
        device: where they run.
    """

    def __init__(self, clip: str, dino: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

        self.device = torch.device(device)
        self.clip, self.words = CLIPModel.from_pretrained(clip).to(device).eval(), CLIPProcessor.from_pretrained(clip)
        self.dino, self.pixels = (
            AutoModel.from_pretrained(dino).to(device).eval(),
            AutoImageProcessor.from_pretrained(dino),
        )

    @torch.no_grad()
    def scores(
        self, drawn: Sequence[Image.Image], prompts: Sequence[str], real: Sequence[Image.Image]
    ) -> dict[str, float]:
        """Mean cosines: DINO and CLIP-I of each drawn picture with each real one, CLIP-T with its own prompt."""
        made, shown = self._clip(drawn), self._clip(real)
        given = self.words(text=list(prompts), return_tensors="pt", padding=True, truncation=True).to(self.device)
        said = F.normalize(_features(self.clip.get_text_features(**given)), dim=-1)
        return {
            "DINO": float((self._dino(drawn) @ self._dino(real).T).mean()),
            "CLIP-I": float((made @ shown.T).mean()),
            "CLIP-T": float((made * said).sum(-1).mean()),
        }

    def _clip(self, images: Sequence[Image.Image]) -> Tensor:  # [n, D]
        given = self.words(images=[image.convert("RGB") for image in images], return_tensors="pt").to(self.device)
        return F.normalize(_features(self.clip.get_image_features(pixel_values=given["pixel_values"])), dim=-1)

    def _dino(self, images: Sequence[Image.Image]) -> Tensor:  # [n, D]
        given = self.pixels([image.convert("RGB") for image in images], return_tensors="pt").to(self.device)
        return F.normalize(self.dino(**given).last_hidden_state[:, 0], dim=-1)


def _features(found: Any) -> Tensor:
    """Of transformers' newer releases, which give an output, and older ones, which give the tensor."""
    return found if isinstance(found, Tensor) else found.pooler_output


def run(
    pipe: Any,
    data: Path,
    output: Path,
    likeness: Likeness,
    *,
    method: str = "added",
    steps: int | None = None,
    seeds: int = 4,
    inference_steps: int = 50,
    captions: Sequence[str] = (),
    together: int = 4,
) -> dict[str, Any]:
    """Learns every subject, draws its prompts and scores them.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        data: see the module.
        output: where it is kept.
        likeness: the judges.
        method: one of `METHODS`.
        steps: of training; default the method's own.
        seeds: pictures of each prompt.
        inference_steps: of each picture.
        captions: for the metric of key-locked concepts.
        together: subjects that learn in one run.

    Returns:
        The mean scores, and those of each subject.
    """
    found, wanted = {}, tasks(data)
    output.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(wanted), together):
        group = wanted[first : first + together]
        uses = _learned(pipe, data, output, group, method, steps, captions)
        for task, use in zip(group, uses, strict=True):
            real = list(PictureFolder.read(data / task.name).subject(task.placeholder, task.kind, 0).images)
            path = output / f"{task.name}-{method}.json"
            if not path.exists():
                orders = [
                    kd.Request(prompt.format(task.placeholder), seed=seed, **use)
                    for prompt in task.prompts
                    for seed in range(seeds)
                ]
                drawn = kd.generate(pipe, orders, num_inference_steps=inference_steps, output_type="pil")
                said = [prompt.format(task.kind) for prompt in task.prompts for _ in range(seeds)]
                for number, image in enumerate(drawn):
                    image.save(output / f"{task.name}-{method}-{number:03}.png")
                path.write_text(json.dumps(likeness.scores(drawn, said, real)) + "\n")
            found[task.name] = json.loads(path.read_text())
    names = ("DINO", "CLIP-I", "CLIP-T")
    return {"mean": {n: sum(one[n] for one in found.values()) / len(found) for n in names}, "subjects": found}


def _learned(
    pipe: Any, data: Path, output: Path, group: Sequence[Task], method: str, steps: int | None, captions: Sequence[str]
) -> list[dict[str, Any]]:
    """What a request of each subject is given."""
    paths = [output / f"{task.name}-{method}.safetensors" for task in group]
    left = [(task, path) for task, path in zip(group, paths, strict=True) if not path.exists()]
    if left:
        subjects = [
            PictureFolder.read(data / task.name).subject(task.placeholder, task.kind, number)
            for number, (task, _) in enumerate(left)
        ]
        configs = {"added": AddedConfig(), "perfusion": PerfusionConfig(), "lora": LoraTrainingConfig()}
        config: Any = configs[method] if steps is None else replace(configs[method], steps=steps)
        made: list[Any]
        if method == "lora":
            made = list(train_loras(pipe, subjects, config))
        else:
            metric = covariance(pipe, captions) if method == "perfusion" else None
            made = list(train_concepts(pipe, subjects, config, metric=metric))
        for (_, path), one in zip(left, made, strict=True):
            if isinstance(one, Exception):
                raise one
            if method == "lora":
                (word,) = one.words.values()
                write_word(_word_file(path), word)
                write_adapter(path, replace(one, words={}), model=ModelShapes.of(pipe))
            else:
                one.save(path)
    if method != "lora":
        return [{"concepts": [Concept.load(path)]} for path in paths]
    shapes = ModelShapes.of(pipe)
    return [
        {
            "loras": [kd.Lora(read_adapter(path, denoiser=shapes.denoiser, text_encoders=shapes.text_encoders))],
            "embeddings": [kd.Embedding(_word_file(path))],
        }
        for path in paths
    ]


def _word_file(path: Path) -> Path:
    return path.with_suffix(".word.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True, help="folder of a pipeline")
    parser.add_argument("--clip", required=True, help="folder of a CLIP model")
    parser.add_argument("--dino", required=True, help="folder of a DINO vision transformer")
    parser.add_argument("--method", choices=METHODS, default="added")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--captions", type=Path, help="a caption a line, for the metric of key-locked concepts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    from diffusers import DiffusionPipeline

    pipe = kd.install(DiffusionPipeline.from_pretrained(given.model).to(given.device))
    lines = given.captions.read_text().splitlines() if given.captions else ()
    found = run(
        pipe,
        given.data,
        given.output,
        Likeness(given.clip, given.dino, given.device),
        method=given.method,
        steps=given.steps,
        seeds=given.seeds,
        captions=lines,
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
