"""What is made of a request before a batch is drawn, and the checks that find a bad one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.checks import floats, number, shown
from keylock_diffusers.concepts import AddedConcept, BaseModel, Concept, KeyLockedConcept
from keylock_diffusers.denoisers.base import Size
from keylock_diffusers.denoisers.neighbours import check_pixels
from keylock_diffusers.denoisers.unet import are_compiled, blocks_of, cross_attention_layers
from keylock_diffusers.encoding import images as image_prompts
from keylock_diffusers.encoding import pictures, text
from keylock_diffusers.encoding.fusion import SubjectFusion, encode_subject
from keylock_diffusers.encoding.images import ImageEncoder
from keylock_diffusers.encoding.learned import LearnedWords
from keylock_diffusers.encoding.regions import PromptRegions, with_loras
from keylock_diffusers.encoding.regions import resolve as resolve_regions
from keylock_diffusers.encoding.tokens import TokenizedPrompt, extended
from keylock_diffusers.encoding.weights import weighted
from keylock_diffusers.encoding.wordings import Wordings
from keylock_diffusers.generation.admission import checked, control_numbers, is_guided
from keylock_diffusers.generation.loras import LoraPlanner, LoraSource, at_their_words, in_wordings
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.loras import LearnedWord
from keylock_diffusers.requests import LOCKS, Region, Request, Use
from keylock_diffusers.routing.images import ImageRouting
from keylock_diffusers.routing.rows import ConceptUse, LoraUse, Row, is_on

Prompts = tuple[TokenizedPrompt, ...]  # one per text encoder


@dataclass(frozen=True)
class ControlUse:
    """One control image of one row."""

    name: str
    pixels: Tensor  # [1, 3, height, width]
    scale: float
    start: float
    end: float

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts in a step."""
        return is_on(self.start, self.end, step, steps)


@dataclass(frozen=True, eq=False)
class Plan:
    """A request whose words, concepts and pictures were found to be in order."""

    request: Request
    row: Row
    negative_row: Row  # of the unconditional half
    wordings: Wordings
    negative_wordings: Wordings
    size: Size  # of the picture, in pixels
    guided: bool
    image: Tensor | None = None  # [1, 3, height, width]
    mask: Tensor | None = None  # [1, 1, height, width]
    controls: tuple[ControlUse, ...] = ()

    @property
    def group(self) -> tuple[Any, ...]:
        """What rows of one batch have in common."""
        return self.guided, self.size, self.wordings.tokens, tuple(control.name for control in self.controls)


@dataclass
class Planner:
    """Looks up, tokenizes and checks everything that requests name, and encodes their image prompts.

    Args:
        denoiser: the pipeline's description.
        bank: where the ids of concepts are looked up.
        controlnets: by name.
        fusion: for requests' subjects.
        image_lengths, max_regions: the room that a row has: see `generate`.
        height, width: what the call asks for, in pixels.
        strict: refuse concepts trained on other weights.
        steps: of the whole schedule.
        limits: what a request may ask for.
        loras: where the ids of LoRAs are looked up.
    """

    denoiser: Any
    bank: Mapping[str, Concept] | None = None
    controlnets: Mapping[str, Any] = field(default_factory=dict)
    fusion: SubjectFusion | None = None
    image_lengths: Sequence[Sequence[int]] | None = None
    max_regions: int | None = None
    height: int | None = None
    width: int | None = None
    strict: bool = False
    steps: int = 50
    limits: RequestLimits = RequestLimits()
    loras: LoraSource | None = None

    def __post_init__(self) -> None:
        self._loras = LoraPlanner(self.denoiser, self.loras, self.limits.picture)
        self._pipe, self._unet = self.denoiser.pipe, self.denoiser.unet
        self._size: Size = self.denoiser.size(self.height, self.width)
        self._images = ImageEncoder(self._pipe, self._unet, self.limits.picture)
        self._base: BaseModel | None = None

    def plan(self, request: Any) -> Plan:
        """The plan of one request.

        Raises:
            Exception: what is wrong with the request, mostly TypeError, ValueError, KeyError or OSError.
        """
        request = checked(request, self.denoiser, self.limits)
        guided = is_guided(self.denoiser, request)
        uses = self._uses(request)
        loras, adapters = self._loras.plan(request)
        words = self._words(request, uses, [word for adapter in adapters for word in adapter.words.values()])
        prompts, negatives = self._prompts(request, uses, words)
        drawn, absent = self._image_prompts(request, guided)
        loras = self._loras.with_faces(loras, request)
        self._check_bound(request, loras)
        subjects = self._subjects(request, prompts)
        halves = self._regions(request, uses, prompts, negatives)
        prompts, negatives, halves = self._in_chunks(request, uses, prompts, negatives, halves)
        if not guided:  # checked, but no row reads it
            halves = halves[0], PromptRegions()
        positive = Wordings(
            () if prompts is None else (prompts, *halves[0].own),
            request.prompt_embeds,
            request.pooled_prompt_embeds,
            uses,
            subjects,
            words=words.vectors,
        )
        negative = self._negative_wordings(request, negatives, halves[1], words)
        positive, half, own = _adapted(positive, halves[0], loras, "regions", self.denoiser.tokenizer)
        uses = _placed(uses, positive)
        positive = replace(positive, uses=uses)
        negative, negative_half, negative_own = _adapted(
            negative, halves[1], loras if guided else (), "negative_regions"
        )
        most = max(positive.own, negative.own)
        if self.max_regions is not None and most > self.max_regions:
            raise ValueError(
                f"regions with a wording of their own must be at most max_regions, {self.max_regions}, got {most}"
            )
        if half.row.uses or negative_half.row.uses or any(use.region is not None for use in (*drawn, *absent)):
            check_pixels(self._unet, "regions")
        if any(use.region is not None or use.bound is not None for use in loras):
            check_pixels(self._unet, "regions of LoRAs", anywhere=True)
        size, image, mask, controls = self._pictures(request)
        start = request.subject_start if uses or subjects else 0.0
        return Plan(
            request,
            Row(uses, drawn, half.row, start, own),
            Row(images=absent, regions=negative_half.row, loras=negative_own),
            positive,
            negative,
            size,
            guided,
            image,
            mask,
            controls,
        )

    def _check_bound(self, request: Request, loras: Sequence[LoraUse]) -> None:
        """What LoRAs that are bound to words of the prompt need."""
        if all(use.bound is None for use in loras):
            return
        check_pixels(self._unet, "LoRAs that are bound to words")
        if self.denoiser.frames > 1:
            raise ValueError("LoRAs must not be bound to words with a pipeline of videos")
        if are_compiled(blocks_of(self._unet, cross_attention_layers(self._unet))):
            raise ValueError("LoRAs must not be bound to words where blocks are compiled one by one")
        if request.prompt is None or request.prompt_2 is not None:
            raise ValueError("LoRAs that are bound to words need one prompt for all text encoders, not encodings")

    def _uses(self, request: Request) -> tuple[ConceptUse, ...]:
        uses = tuple(_resolve(use, self.bank, request.subject_start) for use in request.concepts)
        if uses and self._base is None:
            self._base = BaseModel.of(self._pipe)
        for use in uses:
            use.concept.check(self._base, strict=self.strict)
        if len({use.concept.placeholder for use in uses}) < len(uses):
            raise ValueError("two of its concepts have the same placeholder")
        return uses

    def _words(self, request: Request, uses: Sequence[ConceptUse], bundled: Sequence[LearnedWord]) -> LearnedWords:
        """The learned words of the prompts, if there are text encoders that may read them.

        Args:
            bundled: those that came with LoRA files.
        """
        negative = request.negative_prompt_embeds is None and not self._zeros(request)
        if request.prompt is not None or (negative and is_guided(self.denoiser, request)):
            if not self.denoiser.can_encode:
                raise ValueError("the pipeline's text encoder is not loaded: give prompt_embeds and negative ones")
        widths = [int(encoder.model.config.hidden_size) for encoder in self.denoiser.encoders()]
        taken = [use.concept.placeholder for use in uses]
        return LearnedWords.of(request.embeddings, taken, widths, self.limits, bundled)

    def _prompts(
        self, request: Request, uses: Sequence[ConceptUse], words: LearnedWords
    ) -> tuple[Prompts | None, Prompts | None]:
        """The prompt and the negative prompt, each for every text encoder; None where encodings are given."""
        encoders = self.denoiser.encoders()
        super_classes = {use.concept.placeholder: use.concept.super_class for use in uses}
        nouns = {use.concept.placeholder: use.concept.words for use in uses}

        def tokenized(said: Sequence[str | None], names: Mapping[str, str] | None) -> Prompts:
            if len(encoders) == 1 and said[1] is not None:
                raise ValueError("prompt_2 and negative_prompt_2 must be None with one text encoder")
            made = []
            for place, (tokenizer, *_) in enumerate(encoders):
                parts = weighted((said[1] if place and said[1] is not None else said[0]) or "")
                limits: dict[str, Any] = {"chunks": None, "most": self.limits.tokens, "nouns": nouns}
                spelled = partial(text.converted, self._pipe, tokenizer)
                made.append(text.tokenize(tokenizer, parts, names, words.lengths, **limits, spelled=spelled))
            return tuple(made)

        prompts = negatives = None
        if request.prompt is not None:
            prompts = tokenized((request.prompt, request.prompt_2), super_classes)
        if request.negative_prompt_embeds is None:
            negatives = tokenized((request.negative_prompt, request.negative_prompt_2), None)
        words.check([*(prompts or ()), *(negatives or ())])
        return prompts, negatives

    def _negative_wordings(
        self, request: Request, negatives: Prompts | None, half: PromptRegions, words: LearnedWords
    ) -> Wordings:
        if negatives is None:
            return Wordings((), request.negative_prompt_embeds, request.negative_pooled_prompt_embeds)
        if self._zeros(request):
            length = len(request.prompt_embeds) if request.prompt_embeds is not None else len(negatives[0].ids)
            zeros = torch.zeros(length, self.denoiser.text_width, dtype=torch.float32)
            return Wordings((), zeros, torch.zeros(self.denoiser.pooled_width, dtype=torch.float32))
        return Wordings((negatives, *half.own), words=words.vectors)

    def _zeros(self, request: Request) -> bool:
        """Whether a negative prompt that is not given stands for zeros."""
        return request.negative_prompt is None and self.denoiser.zeros_without_negative

    def _in_chunks(
        self,
        request: Request,
        uses: Sequence[ConceptUse],
        prompts: Prompts | None,
        negatives: Prompts | None,
        halves: tuple[PromptRegions, PromptRegions],
    ) -> tuple[Prompts | None, Prompts | None, tuple[PromptRegions, PromptRegions]]:
        """All that a request reads in as many chunks as the longest of it needs."""
        guided = is_guided(self.denoiser, request)
        every = [p for half in (prompts, negatives if guided else None) if half for p in half]
        every += [p for half in (halves if guided else halves[:1]) for wording in half.own for p in wording]
        chunks = max((prompt.chunks for prompt in every), default=1)

        def longer(half: Prompts | None) -> Prompts | None:
            if half is None or chunks == 1:
                return half
            tokenizers = [encoder.tokenizer for encoder in self.denoiser.encoders()]
            return tuple(extended(t, prompt, chunks) for t, prompt in zip(tokenizers, half, strict=True))

        prompts, negatives = longer(prompts), longer(negatives)
        read = [prompts, None if self._zeros(request) else negatives]
        lengths = {len(half[0].ids) for half in read if half}
        lengths |= {len(e) for e in (request.prompt_embeds, request.negative_prompt_embeds) if e is not None}
        if len(lengths) > 1 and guided:
            raise ValueError(f"prompt and negative prompt must have equally many tokens, got {sorted(lengths)}")
        return prompts, negatives, halves if chunks == 1 else self._regions(request, uses, prompts, negatives, chunks)

    def _image_prompts(self, request: Request, guided: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        for image in request.image_prompts:
            image_prompts.check(image, self._pipe.unet)
        drawn = tuple(self._images.use(image) for image in request.image_prompts)
        ImageRouting([drawn], self.image_lengths)  # raises here what would fail the whole batch
        return drawn, tuple(self._images.use(image, negative=True) for image in request.image_prompts if guided)

    def _subjects(self, request: Request, prompts: Prompts | None) -> tuple[tuple[str, Tensor], ...]:
        """The words that the request's subjects are fused into, and the subjects' encodings."""
        made = []
        taken: set[int] = set()
        for subject in request.subjects:
            embeds = encode_subject(subject, self._pipe, self.fusion, self.limits.picture)
            if prompts is None or len(prompts) > 1:
                raise ValueError("subjects need a prompt, not prompt_embeds, and a pipeline with one text encoder")
            places = text.find(self._pipe.tokenizer, prompts[0], subject.prompt)
            if not places:
                raise ValueError(f"the words {shown(subject.prompt)} of a FusedSubject are not in the prompt")
            tokens = {place[-1] for place in places}
            if tokens & taken:
                raise ValueError(f"two of its subjects are fused into the same word {shown(subject.prompt)}")
            taken |= tokens
            made.append((subject.prompt, embeds))
        return tuple(made)

    def _regions(
        self,
        request: Request,
        uses: Sequence[ConceptUse],
        prompts: Prompts | None,
        negatives: Prompts | None,
        chunks: int | None = None,
    ) -> tuple[PromptRegions, PromptRegions]:
        """Regions of the prompt, those of its concepts and subjects among them, and of the negative prompt."""
        of_concepts = [
            Region(order.region, use.concept.placeholder)
            for order, use in zip(request.concepts, uses, strict=True)
            if isinstance(order, Use) and order.region is not None
        ]
        of_subjects = [Region(s.region, s.prompt) for s in request.subjects if s.region is not None]
        given = [*request.regions, *of_concepts, *of_subjects]
        if (given and request.prompt_2 is not None) or (request.negative_regions and request.negative_prompt_2):
            raise ValueError("regions name words of both text encoders' prompts: prompt_2 must be None with them")
        encoders = self.denoiser.encoders()
        length = encoders[0].tokenizer.model_max_length if encoders else 77
        halves = []
        for name, half, tokenized, embeds in (
            ("regions", given, prompts, request.prompt_embeds),
            ("negative_regions", list(request.negative_regions), negatives, request.negative_prompt_embeds),
        ):
            tokens = embeds.shape[0] if embeds is not None else len(tokenized[0].ids) if tokenized else length
            tokenizers = [encoder.tokenizer for encoder in encoders]
            halves.append(
                resolve_regions(half, tokenized, tokens, tokenizers, request.endings, name, chunks, self.limits.picture)
            )
        return halves[0], halves[1]

    def _pictures(self, request: Request) -> tuple[Size, Tensor | None, Tensor | None, tuple[ControlUse, ...]]:
        """The size of what is drawn, and what it begins from, fills in and follows."""
        pipe, asked = self._pipe, self.height is not None and self.width is not None
        size = self._size
        image = mask = None
        if request.mask is not None and request.image is None:
            raise ValueError("mask needs an image")
        if self.denoiser.fills_in and request.mask is None:
            raise ValueError("this U-Net fills in: give image and mask")
        if request.image is not None:
            if self.denoiser.frames > 1 or not hasattr(pipe, "image_processor"):
                raise ValueError("image must be None with a pipeline of videos")
            if not self.denoiser.begins_without_noise and int(self.steps * request.strength) < 1:
                raise ValueError(f"strength {request.strength} leaves no step of {self.steps}")
            own = not asked and request.mask is None  # an image-to-image row has its picture's size
            image = pictures.initial_image(pipe, request.image, None if own else size, self.limits)
            size = (image.shape[2], image.shape[3])
            if image.shape[1] not in (3, self.denoiser.latent_channels):
                raise ValueError(f"image must have 3 channels, or those of latents, got {image.shape[1]}")
            if image.shape[1] == self.denoiser.latent_channels:
                if request.mask is not None:
                    raise ValueError("mask needs an image, not latents of one")
                size = (size[0] * pipe.vae_scale_factor, size[1] * pipe.vae_scale_factor)
        if request.mask is not None:
            mask = pictures.inpainting_mask(pipe, request.mask, size, self.limits)
        controls: list[ControlUse] = []
        for control in request.controls:
            numbers = control_numbers(control, self.controlnets)
            own = not asked and image is None and not controls
            pixels = pictures.control_image(pipe, control.image, None if own else size, self.limits)
            channels = self.controlnets[control.name].config.conditioning_channels
            if pixels.shape[1] != channels:
                raise ValueError(f"image of a Control must have {channels} channels, got {pixels.shape[1]}")
            size = (pixels.shape[2], pixels.shape[3])
            controls.append(ControlUse(control.name, pixels, *numbers))
        names = [control.name for control in controls]
        if len(set(names)) < len(names):
            raise ValueError(f"controls must have different names, got {names}")
        shape = list(self.denoiser.latent_shape(size))
        if request.latents is not None:
            if request.image is not None:
                raise ValueError("give either image or latents")
            if list(floats(request.latents, "latents").shape) != shape:
                raise ValueError(f"latents must be {shape}, got {list(request.latents.shape)}")
        return size, image, mask, tuple(sorted(controls, key=lambda control: control.name))


def _adapted(
    wordings: Wordings, half: PromptRegions, loras: Sequence[LoraUse], name: str, tokenizer: Any = None
) -> tuple[Wordings, PromptRegions, tuple[LoraUse, ...]]:
    """What one half of a request reads, with its LoRAs; those with a region read wordings of their own."""
    own, masks = in_wordings(loras, 1 + len(half.own))
    half = with_loras(half, wordings[0], wordings.tokens, masks, name)
    prompts = wordings.prompts and (wordings.prompts[0], *half.own)
    if tokenizer is not None:
        own = at_their_words(own, tokenizer, prompts)
    return replace(wordings, prompts=prompts, loras=own, copies=len(masks)), half, own


def _placed(uses: Sequence[ConceptUse], wordings: Wordings) -> tuple[ConceptUse, ...]:
    """The concepts with the places of their own words, of those that act there."""
    made = []
    for use in uses:
        name = use.concept.placeholder
        if isinstance(use.concept, AddedConcept):
            places = [
                {tuple((p, n) for p, word, n in tokenized.words if word == name) for tokenized in wording}
                for wording in wordings.prompts
            ]
            if any(len(found) > 1 for found in places):
                raise ValueError(f"{name} must stand at the same tokens of prompt and prompt_2")
            use = replace(use, places=tuple(found.pop() for found in places))
        made.append(use)
    return tuple(made)


def _resolve(use: Use | str | Concept, bank: Mapping[str, Concept] | None, start: float) -> ConceptUse:
    """A concept with its numbers, which are its own where a request does not say them; `start` is the request's."""
    if not isinstance(use, Use):
        use = Use(use)
    concept = use.concept
    if isinstance(concept, str):
        if bank is None:
            raise ValueError(f"concept {shown(concept)} is an id, but generate was given no bank")
        try:
            concept = bank[concept]
        except KeyError as error:
            if type(error) is not KeyError:  # a bank's own says more
                raise
            raise KeyError(f"no concept {shown(concept)} in the bank") from None
    if not isinstance(concept, Concept):
        raise TypeError(f"a concept must be an id or a Concept, got {type(concept).__name__}")
    if use.lock not in LOCKS:
        raise ValueError(f'lock must be "local" or "global", got {shown(use.lock)}')
    name = concept.placeholder
    given: dict[str, Any] = {"strength": use.strength}
    if isinstance(concept, KeyLockedConcept):
        given["beta"] = concept.beta if use.beta is None else use.beta
        given["tau"] = concept.tau if use.tau is None else use.tau
    elif (use.beta, use.tau, use.lock) != (None, None, "local"):
        odd = next(n for n in ("beta", "tau", "lock") if getattr(use, n) not in (None, "local"))
        raise ValueError(f"{odd} of {name} must not be given: it adds at its own words, without a gate or locked keys")
    numbers: dict[str, Any] = {key: number(value, f"{key} of {name}") for key, value in given.items()}
    if numbers.get("tau", 0.0) < 0:
        raise ValueError(f"tau of {name} must be at least 0, got {numbers['tau']:g}")
    own = max(start, concept.start) if use.start is None else number(use.start, f"start of {name}", 0, 1)
    return ConceptUse(concept, lock=use.lock, start=own, **numbers)
