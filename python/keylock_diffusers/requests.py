"""What users order, as plain data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from keylock_diffusers.checks import listed, reason_of, shown
from keylock_diffusers.files import open_regular
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.pictures import open_picture

ENDINGS = ("own", "everywhere", "outside", "hidden")
LOCKS = ("local", "global")


@dataclass(frozen=True, eq=False)
class Region:
    """Words of a prompt that are attended to only inside a mask; all other words are attended to everywhere.

    Args:
        mask: where, a picture in greys or a tensor [height, width] of 0..1, which is stretched over the whole of what
            is drawn. A layer's pixel belongs to it where it covers at least half of the pixel, or covers it most.
        prompt: the words, as they stand in the prompt, placeholders included; wherever they stand.
        tokens: instead of `prompt`, the words' positions among the prompt's tokens, the start token being 0.

    Paper: regions as in localized attention, Xiao et al., FastComposer, arXiv 2305.10431.
    """

    mask: Any  # [height, width]
    prompt: str | None = None
    tokens: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One image prompt of a request: a picture, or several that are attended to together, under one softmax.

    Args:
        image: a picture, or a list of them, as the pipeline's image encoder takes it.
        embeds: instead of `image`, encodings [n, D] or [n, S, D] of n pictures (FaceID: n faces).
        negative_embeds: of the unconditional half, of the same shape; default zeros. Adapters that read hidden states
            were trained with those of a black picture instead, which `image` takes by itself.
        clip_embeds: CLIP encodings [n, S, D] of the faces, for FaceID-Plus adapters.
        negative_clip_embeds: of the unconditional half, of the same shape; default zeros.
        scale: how much the image counts: a number, or diffusers' dict of numbers per block (InstantStyle).
        region: where it counts, a picture in greys or a tensor [height, width] of weights, which is stretched over the
            whole of what is drawn; default everywhere.
        start: the share of the steps before it is switched on; a step counts where it starts.
        end: the share of the steps by whose end it is switched off.
        adapter: which of the loaded adapters.

    Paper: Ye et al., IP-Adapter, arXiv 2308.06721.
    """

    image: Any = None
    embeds: Tensor | None = None  # [n, D] or [n, S, D]
    negative_embeds: Tensor | None = None  # as embeds
    clip_embeds: Tensor | None = None  # [n, S, D]
    negative_clip_embeds: Tensor | None = None  # as clip_embeds
    scale: float | Mapping[str, Any] = 1.0
    region: Any = None  # [height, width]
    start: float = 0.0
    end: float = 1.0
    adapter: int = 0


@dataclass(frozen=True, eq=False)
class FusedSubject:
    """A picture of the subject that a word of the prompt names, for `generate` with a `SubjectFusion`.

    Args:
        prompt: the words, as they stand in the prompt; the last of their tokens, wherever they stand, is fused.
        image: the picture, as the pipeline's image encoder takes it.
        embeds: instead of `image`, its encoding [D].
        region: where the words may be seen, as a `Region`'s mask; default everywhere.

    Paper: Xiao et al., FastComposer, arXiv 2305.10431.
    """

    prompt: str
    image: Any = None
    embeds: Tensor | None = None  # [D]
    region: Any = None  # [height, width]


@dataclass(frozen=True)
class Use:
    """One concept in a request.

    Args:
        concept: an id of the bank that `generate` is given, or a Concept.
        beta, tau: where a key-locked concept's gate opens, and its temperature; default the concept's own.
        strength: 1 is the concept as trained, 0 exactly its absence.
        lock: "local": keys are locked to the super-class token by token; "global": all keys are those of the prompt
            with the super-class in the concept's place, which follows the prompt more and the subject less.
        region: where the concept's word may be seen, as a `Region`'s mask; default everywhere.
        start: as the request's `subject_start`, of this concept; default the larger of that and the concept's own.
    """

    concept: Any  # str, or a keylock_diffusers.Concept
    beta: float | None = None
    tau: float | None = None
    strength: float = 1.0
    lock: str = "local"
    region: Any = None  # [height, width]
    start: float | None = None


@dataclass(frozen=True)
class Attention:
    """A region that nobody draws: where the pixels attend to a word, as a `Lora`'s.

    The word's map is read out in each step, in the same pass, and is the region of the step that follows; in the first
    one nothing lies in it. A map is the mean over layers and heads, over its largest value.

    Args:
        word: a word of the prompt as it stands there, placeholders included.
        threshold: the value of the map at which a pixel is half inside.

    Papers: maps of words, Tang et al., DAAM, arXiv 2210.04885; localized attention, Xiao et al., arXiv 2305.10431.
    """

    word: str
    threshold: float = 0.4


@dataclass(frozen=True, eq=False)
class Lora:
    """One low-rank adapter of a request.

    Args:
        lora: an id of the bank that `generate` is given as `loras`, a Path of a file of any tool's (text is always an
            id), or an Adapter that was read.
        strength: 1 is the adapter as trained, 0 exactly its absence, below 0 its opposite (sliders).
        text_strength: of its half in the text encoders; default `strength`.
        region: where it counts, as an `ImagePrompt`'s; words that it taught are read inside of it alone. Or an
            `Attention`: of the text it then counts at the word's own tokens, and of the picture where that is seen.
        start: the share of the steps before it is switched on; a step counts where it starts.
        end: the share of the steps by whose end it is switched off.
        blocks: further factors per block of the U-Net, in the form of diffusers' `set_adapters`:
            ``{"down": 0.5, "mid": 1.0, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}``; 1 where nothing is said.

    Paper: Hu et al., LoRA, arXiv 2106.09685.
    """

    lora: Any  # str, Path, or a keylock_diffusers.loras.Adapter
    strength: float = 1.0
    text_strength: float | None = None
    region: Any = None  # [height, width]
    start: float = 0.0
    end: float = 1.0
    blocks: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word that textual inversion taught, in one request's prompts: the prompt, the negative one, or both.

    Args:
        source: a safetensors file's Path (as diffusers, A1111 or kohya write it, or SDXL's of two text encoders), or a
            `keylock_diffusers.loras.LearnedWord`.
        name: what the prompts call it: text without spaces, such as ``<bad-hand>`` or ``EasyNegative``, that stands in
            at least one of them as a word of its own; capitals do not matter. Default: the word's own name, which is
            its file's where the file says none.

    Paper: Gal et al., Textual Inversion, arXiv 2208.01618.
    """

    source: Any  # Path, or a keylock_diffusers.loras.LearnedWord
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Control:
    """One control image of a request, for a ControlNet that `generate` is given by name.

    Args:
        name: of the ControlNet.
        image: the picture it follows, as it takes it (edges, depth, a pose ...).
        scale: how much it counts.
        start: the share of the steps before it is switched on; a step counts where it starts.
        end: the share of the steps by whose end it is switched off.

    Paper: Zhang et al., ControlNet, arXiv 2302.05543.
    """

    name: str
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Request:
    """One picture order: everything that may differ between the rows of a batch.

    Args:
        prompt: text in which each concept's placeholder stands once or more; of any length, and with weights such as
            ``(word:1.3)``, ``(word)`` and ``[word]`` (docs/prompts.md).
        prompt_embeds: encodings [T, D] instead of a prompt, without concepts.
        negative_prompt: text for the unconditional half; concepts' placeholders are not allowed in it.
        negative_prompt_embeds: encodings [T, D] instead of a negative prompt.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: SDXL's pooled encodings [P] that go with those.
        guidance_scale: weight of the prompt; 1 or less is without guidance.
        concepts: what the prompt's placeholders stand for.
        loras: low-rank adapters, of the whole picture or of regions of it; they act on both halves of guidance.
        embeddings: learned words of the prompts, the negative ones included.
        image_prompts: pictures that the drawn one should resemble, through the pipeline's IP-Adapters.
        subjects: pictures of what words of the prompt name, through `generate`'s fusion module.
        subject_start: the share of the steps that are drawn before concepts and subjects count, their super-classes or
            plain words in their place: 1 - alpha of FastComposer's delayed subject conditioning (alpha 0.6 to 0.8).
        regions: where words of the prompt may be seen.
        negative_regions: the same for the negative prompt; without them it is seen everywhere.
        endings: in a picture with regions, what becomes of the prompt's end token and padding. They carry all of its
            words, so that masking the words alone lets subjects bleed into each other. "own": each region reads a
            wording of its own, the whole prompt with its words in the place of every region's ("a cat and a dog" as "a
            cat and a cat"), and the rest of the picture reads the prompt; "everywhere", "outside" (where no region is)
            and "hidden": where they are seen, while regions' words are masked. docs/localization.md compares them.
        seed: of the first image; image k takes seed + k. None: a different picture every time.
        num_images: how many.
        id: what errors and files call the request.
        prompt_2, negative_prompt_2: what SDXL's second text encoder reads instead; with the same placeholders.
        image: a picture to begin from, as the pipeline's image processor takes it.
        strength: how much of `image` is changed, 0 to 1: the share of the steps that are drawn.
        mask: white where `image` is filled in, black where it stays.
        controls: control images for ControlNets.
        latents: the first latents [C, h, w], instead of noise from the seed.
        original_size, target_size, crops_coords_top_left: SDXL's sizes; default those of what is drawn.
        negative_original_size, negative_target_size, negative_crops_coords_top_left: of the unconditional half.
        aesthetic_score, negative_aesthetic_score: of SDXL's refiner.
    """

    prompt: str | None = None
    prompt_embeds: Tensor | None = None  # [T, D]
    negative_prompt: str | None = None
    negative_prompt_embeds: Tensor | None = None  # [T, D]
    pooled_prompt_embeds: Tensor | None = None  # [P]
    negative_pooled_prompt_embeds: Tensor | None = None  # [P]
    guidance_scale: float = 7.5
    concepts: Sequence[Any] = ()  # Use, or what its `concept` takes
    loras: Sequence[Any] = ()  # Lora, or what its `lora` takes
    embeddings: Sequence[Embedding] = ()
    image_prompts: Sequence[ImagePrompt] = ()
    subjects: Sequence[FusedSubject] = ()
    subject_start: float = 0.0
    regions: Sequence[Region] = ()
    negative_regions: Sequence[Region] = ()
    endings: str = "own"
    seed: int | None = None
    num_images: int = 1
    id: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    image: Any = None
    strength: float = 0.8
    mask: Any = None  # [height, width]
    controls: Sequence[Control] = ()
    latents: Tensor | None = None  # [C, h, w]
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_original_size: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    @classmethod
    def from_json(
        cls,
        order: Any,
        folder: str | os.PathLike[str] | None = None,
        *,
        outside: bool = False,
        limits: RequestLimits = RequestLimits(),
    ) -> Request:
        """A request as JSON says it: fields by their names, and what they hold as objects of the classes here.

        Pictures (``image``, ``mask``, ``region``), embeddings (``source``) and a ``lora`` that ends in ``.safetensors``
        are names of files inside a folder; nothing else is opened.

        Args:
            order: the JSON object.
            folder: where its files are; None: it may have none.
            outside: whether names may lead out of the folder.
            limits: of its pictures, checked before they are decoded.

        Raises:
            TypeError, ValueError: what it says is no request; the message names the field.
            OSError: a picture cannot be read, or there is no such file.

        Example:
            >>> Request.from_json({"prompt": "a cat", "concepts": [{"concept": "alice/cat"}], "seed": 1}).seed
            1
        """
        return _Reader(None if folder is None else Path(folder), outside, limits).made(cls, order, "a request")

    def __str__(self) -> str:
        words = shown(self.prompt, 40) if self.prompt is not None else "prompt_embeds"
        name = shown(self.id, 40).strip("'")  # on one line, whatever it is
        return words if self.id is None else f"{name}: {words}"


class RequestError(ValueError):
    """A request that cannot be drawn.

    Args:
        index: which of the call's requests.
        request: the request.
        reason: what is wrong with it.

    Attributes:
        index, id: which request it was.
        reason: what is wrong with it.
        images: where it was found only while pictures were drawn, what `generate` would have returned: everybody
            else's pictures, and the errors in their places.
    """

    def __init__(self, index: int, request: Any, reason: str) -> None:
        said = str(request) if isinstance(request, Request) else shown(request)
        super().__init__(f"request {index} ({said}): {reason}")
        self.index, self.reason = index, reason
        self.id = request.id if isinstance(request, Request) else None
        self.images: list[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (str(self), vars(self))


def _again(message: str, facts: dict[str, Any]) -> RequestError:
    error = RequestError.__new__(RequestError, message)
    error.args = (message,)
    vars(error).update(facts)
    return error


PICTURES = ("image", "mask", "region")
FILES = ("source",)  # fields that are names of other files
_PAIRS = (
    "original_size", "target_size", "crops_coords_top_left",
    "negative_original_size", "negative_target_size", "negative_crops_coords_top_left",
)  # fmt: skip
# What a list of a request holds; its items may also be what the class's first field is.
LISTS: Mapping[str, type] = {
    "concepts": Use,
    "loras": Lora,
    "embeddings": Embedding,
    "image_prompts": ImagePrompt,
    "subjects": FusedSubject,
    "regions": Region,
    "negative_regions": Region,
    "controls": Control,
}
NAMED = (Use, Lora)  # whose first field is an id, which may stand for them
SUFFIX = ".safetensors"  # in JSON what ends in it is a file in the folder, and anything else an id
TENSORS = ("embeds", "latents")  # the ends of names of fields that JSON cannot hold


def _regular(path: Path) -> Path:
    with open_regular(path):
        return path


@dataclass
class _Reader:
    """Reads the objects of one request out of JSON."""

    folder: Path | None
    outside: bool
    limits: RequestLimits
    opened: int = 0
    pixels: int = 0

    def made(self, kind: Any, given: Any, what: str) -> Any:
        """An object of a class from a JSON object that names its fields."""
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must be an object, got {type(given).__name__}")
        names = [field.name for field in fields(kind) if not field.name.endswith(TENSORS)]
        values = {}
        for name, value in given.items():
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"{shown(name)} is no field of {what}{hint}")
            if kind is Request and name in LISTS:
                items = enumerate(listed(value, name))
                value = [self._item(LISTS[name], item, f"{name}[{number}]") for number, item in items]
            elif name in _PAIRS and value is not None:
                value = tuple(listed(value, name))
            elif kind is Lora and name == "region" and isinstance(value, Mapping):
                value = self.made(Attention, value, "region of a Lora")
            elif name in PICTURES and value is not None:
                several = isinstance(value, list)
                value = [self._picture(one, name) for one in value] if several else self._picture(value, name)
            elif name in FILES or (kind is Lora and name == "lora" and str(value).endswith(SUFFIX)):
                value = self._opened(value, name, "files", _regular)
            values[name] = value
        try:
            return kind(**values)
        except TypeError as error:
            raise TypeError(f"{what}: {str(error).rpartition('() ')[2]}") from None

    def _item(self, kind: type, given: Any, what: str) -> Any:
        if kind in NAMED and isinstance(given, str):
            given = {fields(kind)[0].name: given}
        return self.made(kind, given, what)

    def _picture(self, name: Any, field: str) -> Image.Image:
        return self._opened(name, field, "pictures", self._decoded)

    def _decoded(self, path: Path) -> Image.Image:
        self.opened += 1
        if self.opened > self.limits.pictures:
            raise ValueError(f"is one too many: a request must hold at most {self.limits.pictures} pictures and masks")
        left = min(self.limits.picture.pixels, self.limits.pixels - self.pixels)
        picture = open_picture(path, replace(self.limits.picture, pixels=left))
        self.pixels += picture.width * picture.height
        return picture

    def _opened(self, name: Any, field: str, kind: str, read: Callable[[Path], Any]) -> Any:
        """What is made of a file that JSON names."""
        if not isinstance(name, str):
            raise TypeError(f"{field} must be the name of a file, got {type(name).__name__}")
        if self.folder is None:
            raise ValueError(f"{field} must be None where no folder of {kind} was given, got {shown(name)}")
        try:
            path = (self.folder / name).resolve()
            if not self.outside and not path.is_relative_to(self.folder.resolve()):
                raise ValueError(f"must be a file inside {self.folder}, got {shown(name)}")
            return read(path)
        except OSError as error:
            raise type(error)(error.errno, f"{field}: {error.strerror or reason_of(error)}", name[:200]) from error
        except (ValueError, RuntimeError) as error:  # a zero in the name, a circle of links
            raise ValueError(f"{field} {reason_of(error)}") from error
