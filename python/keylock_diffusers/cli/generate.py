"""``keylock generate``: a file of requests becomes pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import Bank, Model


def generate(
    requests: Annotated[
        Path,
        typer.Argument(
            help="JSON file: a list of requests, each with the fields of keylock_diffusers.Request: prompt, concepts "
            "(ids, or objects with concept, beta, tau, strength, lock, region), image_prompts (objects with "
            "image, a file or several, and scale, region, start, end, adapter), regions and negative_regions "
            "(objects with mask and prompt or tokens), endings, subjects (objects with prompt, image, region), "
            "subject_start, image, strength, mask, controls (objects with name, image, scale, start, end), id, seed, "
            "guidance_scale, negative_prompt, num_images ... Pictures and masks are files beside it."
        ),
    ],
    bank: Bank = "concepts",
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs"),
    model: Model = "embedded",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    max_batch: Annotated[int, typer.Option(min=1, help="Pictures per call of the U-Net.")] = 8,
    controlnet: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a ControlNet, for controls of that name; once for each."),
    ] = None,
    ip_adapter: Annotated[
        list[Path] | None, typer.Option(help="An IP-Adapter's file, for image_prompts; once for each adapter.")
    ] = None,
    image_encoder: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP image encoder that the adapters were trained with.")
    ] = None,
    fusion: Annotated[Path | None, typer.Option(help="Weights of a subject fusion module, for subjects.")] = None,
    show_attention: Annotated[
        list[str] | None,
        typer.Option(help="Words of the prompts whose attention is drawn beside each picture; once for each."),
    ] = None,
) -> None:
    """Draw a list of requests, of different users, together."""
    import keylock_diffusers as kd

    orders = _orders(requests)
    pipe = common.load(model)
    if model == "embedded" and not ip_adapter and any(order.image_prompts for order in orders):
        from keylock_diffusers import embedded

        embedded.load_adapter(pipe)
    _load_ip_adapters(pipe, ip_adapter or [], image_encoder)
    kd.install(pipe).set_progress_bar_config(disable=False)
    options: dict[str, Any] = {
        "bank": kd.ConceptBank(bank),
        "num_inference_steps": steps,
        "max_batch": max_batch,
        "controlnets": _controlnets(controlnet or [], pipe),
        "fusion": None if fusion is None else kd.SubjectFusion.load(fusion).to(pipe.device),
    }
    maps = kd.AttentionMaps(_shown(show_attention, orders, options["bank"])) if show_attention else None
    images = kd.generate(pipe, orders, record=maps, **options)
    output.mkdir(parents=True, exist_ok=True)
    if maps is not None:
        from keylock_diffusers.generation import visualize

        flat = [image for drawn in images for image in (drawn if isinstance(drawn, list) else [drawn])]
        visualize.grid(flat, maps.images).save(output / "attention.png")
        print(output / "attention.png")
    for index, drawn in enumerate(images):
        for number, image in enumerate(drawn if isinstance(drawn, list) else [drawn]):
            if image is None:  # the call was stopped before
                continue
            path = output / (f"{index:03d}.png" if not isinstance(drawn, list) else f"{index:03d}-{number}.png")
            image.save(path)
            print(path)


def _controlnets(given: list[str], pipe: Any) -> dict[str, Any]:
    from diffusers import ControlNetModel

    found = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not name or not equals or not Path(folder).is_dir():
            raise ValueError(f"--controlnet must be NAME=FOLDER of a ControlNet, got {one!r}")
        found[name] = ControlNetModel.from_pretrained(folder, torch_dtype=pipe.unet.dtype).to(pipe.device)
    return found


def _load_ip_adapters(pipe: Any, files: list[Path], image_encoder: Path | None) -> None:
    if image_encoder is not None:
        from transformers import CLIPVisionModelWithProjection

        encoder = CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=pipe.unet.dtype)
        pipe.register_modules(image_encoder=encoder.to(pipe.device))
    if files:
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"--ip-adapter: there is no file {missing[0]}")
        pipe.load_ip_adapter(
            [str(file.parent) for file in files],
            subfolder="",
            weight_name=[file.name for file in files],
            image_encoder_folder=None,
        )


def _shown(words: list[str], orders: list[Any], bank: Any) -> dict[str, tuple[str, ...]]:
    """Words whose attention is shown; a super-class stands for the placeholders of its concepts too."""
    from keylock_diffusers import Use

    of_class: dict[str, list[str]] = {}
    for order in orders:
        for use in order.concepts:
            concept = use.concept if isinstance(use, Use) else use
            if isinstance(concept, str) and concept in bank:
                held = bank[concept]
                of_class.setdefault(held.super_class, []).append(held.placeholder)
    return {word: (word, *dict.fromkeys(of_class.get(word, ()))) for word in words}


def _orders(path: Path) -> list[Any]:
    from keylock_diffusers import Request

    try:
        listed = json.loads(path.read_text())
        if not isinstance(listed, list):
            raise ValueError(f"must be a list of requests, got {type(listed).__name__}")
        return [Request.from_json(order, path.parent) for order in listed]
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
