"""``keylock generate``: a file of requests becomes pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import Bank, Device, Dtype, Height, Loras, Model, Scheduler, Variant, Width


def generate(
    requests: Annotated[
        Path,
        typer.Argument(
            help="JSON file: a list of requests with the fields of keylock_diffusers.Request, pictures and masks as "
            "files beside it. `keylock schema` says what it may hold, `keylock example` writes one."
        ),
    ],
    bank: Bank = "concepts",
    loras: Loras = "loras",
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the folder's pictures of requests that are unchanged; draw the rest."),
    ] = False,
    outside: Annotated[
        bool, typer.Option("--outside", help="Let requests name pictures outside of their file's folder.")
    ] = False,
    model: Model = "embedded",
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    scheduler: Scheduler = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    height: Height = None,
    width: Width = None,
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
    """Draw a list of requests, of different users, together.

    Each picture is written as it is drawn, and says in its file what it was drawn from.
    """
    import keylock_diffusers as kd
    from keylock_diffusers.cli import drawn, orders, work

    listed, concepts, adapters = orders.read(requests, outside=outside), kd.ConceptBank(bank), kd.LoraBank(loras)
    drawn.prepare(output)
    nets = _named(controlnet or [])
    for option, paths in {"ip-adapter": ip_adapter, "image-encoder": [image_encoder], "fusion": [fusion]}.items():
        missing = [path for path in paths or () if path is not None and not path.exists()]
        if missing:
            raise ValueError(f"--{option}: there is no file {missing[0]}")
    loading = {"dtype": dtype, "variant": variant, "scheduler": scheduler}
    files = {"controlnet": controlnet, "ip_adapter": ip_adapter, "image_encoder": image_encoder, "fusion": fusion}
    said = {"model": model, **loading, "steps": steps, "height": height, "width": width, **files}
    settings = {name: _plain(value) for name, value in said.items() if value is not None}
    identity = orders.Identity(settings, concepts, adapters)
    pictures = work.Work(listed, output, identity, resume)
    if pictures.jobs:
        pipe = common.load(model, **loading, device=device)
        if model == "embedded" and not ip_adapter and any(order.request.image_prompts for order in listed):
            from keylock_diffusers import embedded

            embedded.load_adapter(pipe)
        _load_ip_adapters(pipe, ip_adapter or [], image_encoder)
        kd.install(pipe).set_progress_bar_config(disable=False)
        words = _shown(show_attention or [], listed, concepts)
        pictures.draw(
            pipe,
            words,
            bank=concepts,
            loras=adapters,
            num_inference_steps=steps,
            height=height,
            width=width,
            max_batch=max_batch,
            controlnets=_controlnets(nets, pipe),
            fusion=None if fusion is None else kd.SubjectFusion.load(fusion).to(pipe.device),
        )
    elif show_attention:
        print("attention is shown of pictures that are drawn, and none was to be drawn")
    pictures.tell()


def _plain(value: Any) -> Any:
    """An option as JSON."""
    return [str(one) for one in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value


def _named(given: list[str]) -> dict[str, Path]:
    """The folders of ControlNets by the names that requests' controls have."""
    found = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not name or not equals or not Path(folder).is_dir():
            raise ValueError(f"--controlnet must be NAME=FOLDER of a ControlNet, got {one!r:.80}")
        found[name] = Path(folder)
    return found


def _controlnets(folders: dict[str, Path], pipe: Any) -> dict[str, Any]:
    from diffusers import ControlNetModel

    return {
        name: ControlNetModel.from_pretrained(folder, dtype=pipe.unet.dtype).to(pipe.device)
        for name, folder in folders.items()
    }


def _load_ip_adapters(pipe: Any, files: list[Path], image_encoder: Path | None) -> None:
    if image_encoder is not None:
        from transformers import CLIPVisionModelWithProjection

        encoder = CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=pipe.unet.dtype)
        pipe.register_modules(image_encoder=encoder.to(pipe.device))
    if files:
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
        for use in order.request.concepts:
            concept = use.concept if isinstance(use, Use) else use
            if isinstance(concept, str) and concept in bank:
                held = bank[concept]
                of_class.setdefault(held.super_class, []).append(held.placeholder)
    return {word: (word, *dict.fromkeys(of_class.get(word, ()))) for word in words}
