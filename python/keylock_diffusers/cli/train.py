"""``keylock train``: pictures of a folder become a concept, or a LoRA."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import Device, Dtype, Model, Scheduler, Variant
from keylock_diffusers.cli.subjects import Order, places

_FOLLOWING_EVERY = 25  # steps


def train(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures of one subject; NAME.txt beside NAME.png is its caption, NAME-mask.png its mask. "
            "Captions and masks make a concept better: what they tell apart is not learned as the subject's."
        ),
    ],
    placeholder: Annotated[
        str,
        typer.Option(
            help="The word for it in prompts, such as <alice-cat>; for a LoRA also plain words. With --users, {} in it "
            "is a user's name."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="The file to write; a LoRA's word becomes NAME.embedding.safetensors beside it. With --users, a "
            "folder of them."
        ),
    ],
    super_class: Annotated[
        str,
        typer.Option(
            help="What it is, such as cat; beside plain words not needed. With --users, what super-class.txt in a "
            "user's folder does not say."
        ),
    ] = "",
    users: Annotated[
        bool,
        typer.Option(
            "--users", help="PICTURES holds a folder of pictures for each user: all learn in one run, each as if alone."
        ),
    ] = False,
    method: Annotated[str, typer.Option(help="concept or lora")] = "concept",
    edit: Annotated[
        str | None,
        typer.Option(help="Of a concept: added (the default; at words of its own) or perfusion (key-locked)."),
    ] = None,
    model: Model = "embedded",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default 400, 500 for a LoRA; embedded model: 180, 100 for a LoRA.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Default 16, 4 for a LoRA; 6 for a concept of the embedded model.")
    ] = None,
    words: Annotated[int | None, typer.Option(min=1, help="Of an added concept; default 5.")] = None,
    keys: Annotated[
        int | None, typer.Option(min=0, help="Of how many of these words keys are learned; default 1.")
    ] = None,
    values: Annotated[
        int | None, typer.Option(min=0, help="Of how many of these words values are learned; default 2.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of a LoRA; default 4.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help='What of the model a LoRA changes: names with commas between, "linear" or "all".'),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of a LoRA; default 1e-4, 2e-3 for the embedded model.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Text file, a caption a line, for the metric C; needed for models of your own.")
    ] = None,
    values_rate: Annotated[
        float | None, typer.Option(help="Learning rate of a concept's values, in units of their size.")
    ] = None,
    keys_rate: Annotated[
        float | None, typer.Option(help="Learning rate of an added concept's keys, in units of their size.")
    ] = None,
    encodings_rate: Annotated[
        float | None, typer.Option(help="Learning rate of an added concept's encodings, in units of their size.")
    ] = None,
    embedding_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of the word of a key-locked concept or a LoRA, in units of its size."),
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How much the model is to say, outside of masks, what it says without what is learned; default 1 for "
            "an added concept, else 0.",
        ),
    ] = None,
    views: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the time that pictures are shown smaller; default 0.25 for an added concept, else 0.",
        ),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the steps that are drawn before an added concept counts; default 0."),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    localize: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the localization loss of a concept, such as 1e-3; needs masks."),
    ] = None,
    auto_masks: Annotated[
        str | None,
        typer.Option(
            help="Make masks where there are none: attention (where the model sees the super-class's word), or the "
            "folder of a CLIPSeg model."
        ),
    ] = None,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16")] = "no",
    target_gradient: Annotated[
        str | None, typer.Option(help="Of a concept's target input: none (the default), straight-through or exact.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File to resume from and to write; default a hidden one beside the output, gone at the end."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    scheduler: Scheduler = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output, if it is there.")] = False,
    samples_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps after which pictures are drawn, into OUTPUT.samples.png beside the output."),
    ] = None,
    following_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps after which it is measured how far pictures still follow other words; with "
            "--least-following 25 by default.",
        ),
    ] = None,
    least_following: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Stop a subject in whose pictures other words change less than this share of what they change in its "
            "super-class's.",
        ),
    ] = None,
    following_prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of the prompts for that, one a line, with {} where the subject is named."),
    ] = None,
) -> None:
    """Learn a concept, or a LoRA, from a few pictures; or many users' in one run."""
    from keylock_diffusers.checks import one_of
    from keylock_diffusers.cli import drawn
    from keylock_diffusers.training import PromptFollowing, Samples, covariance, train_concepts, train_loras
    from keylock_diffusers.training.frozen import check_pipeline

    given: dict[str, dict[str, Any]] = {
        "all": {
            "steps": steps,
            "batch_size": batch_size,
            "mixed_precision": mixed_precision,
            "embedding_rate": embedding_rate,
            "prior": prior,
            "views": views,
        },
        "a LoRA (--method lora)": {"rank": rank, "targets": targets, "learning_rate": learning_rate},
        "a concept": {"values_rate": values_rate, "localize": localize},
        "a key-locked concept (--edit perfusion)": {"target_gradient": target_gradient},
        "an added concept (--edit added)": {
            "words": words,
            "keys": keys,
            "values": values,
            "keys_rate": keys_rate,
            "encodings_rate": encodings_rate,
            "start": start,
        },
    }
    is_lora = one_of(method, "--method", ("concept", "lora")) == "lora"
    edits = one_of(edit or "added", "--edit", ("added", "perfusion"))
    if embedding_rate is not None and not is_lora and edits == "added":
        raise ValueError("--embedding-rate is an option of a LoRA and of a key-locked concept (--edit perfusion)")
    others: dict[str, dict[str, Any]] = {
        "a concept": {"edit": edit, "samples_every": samples_every},
        "a key-locked concept (--edit perfusion)": {"captions": captions},
    }
    config = _config(model, "lora" if is_lora else edits, given, others)
    if users and samples_every:
        raise ValueError("--samples-every draws one subject's samples: it cannot be given with --users")
    orders = [
        Order.of(place, word, file, super_class, seed + number, is_lora, overwrite, alone=not users)
        for number, (place, word, file) in enumerate(places(pictures, placeholder, output, users))
    ]
    for order in orders:
        if localize and not auto_masks and order.subject is not None and order.subject.masks is None:
            raise ValueError(f"--localize needs masks, and {order.place} has none")
    followed = _followed(model, following_every, least_following, following_prompts)
    locked = not is_lora and edits == "perfusion"
    lines = _captions(model, captions) if locked else []
    if dtype == "float16":
        raise ValueError("--dtype must be float32 or bfloat16 for training, since gradients vanish in float16")
    print(*(f"{order.place}: {order.said}" for order in orders), sep="\n")
    pipe = common.load(model, dtype=dtype, device=device, variant=variant, scheduler=scheduler)
    check_pipeline(pipe, "keylock train", two=True)
    pipe.set_progress_bar_config(disable=True)  # of samples: it would tear training's own
    own = checkpoint or output.with_name(f".{output.name}.checkpoint")
    if auto_masks:
        orders = [order.masked(pipe, auto_masks, alone=not users) for order in orders]
    subjects = [order.subject for order in orders if order.subject is not None]
    samples = None
    if samples_every:
        strip = drawn.free(output.with_name(f"{output.name}.samples.png"))
        samples = Samples(pipe, subjects[0], strip, samples_every)
    following = PromptFollowing(pipe, subjects, **followed) if followed and subjects else None
    on_step = _all_of([watch for watch in (samples, following) if watch is not None])
    learned: list[Any] = []
    with _stoppable():
        if is_lora and subjects:
            learned = [*train_loras(pipe, subjects, config, checkpoint_path=own, on_step=on_step)]
        elif subjects:
            metric = covariance(pipe, lines, progress=True) if locked else None
            learned = [*train_concepts(pipe, subjects, config, metric=metric, checkpoint_path=own, on_step=on_step)]
    failed = _finish(pipe, orders, learned, own, is_lora, overwrite, not users, following)
    if checkpoint is None:
        own.unlink(missing_ok=True)
    if samples is not None and samples.path.exists():
        print(f"{samples.path}: samples, beside the super-class {super_class}")
    if failed and not users:
        raise ValueError(str(failed[0])) from failed[0]
    if failed:
        print(f"keylock: {len(failed)} of {len(orders)} users' subjects were not learned", file=sys.stderr)
        raise typer.Exit(1)


def _all_of(watching: Sequence[Any]) -> Any:
    """One function that is called after every step in the place of several."""

    def on_step(step: int, results: Any) -> list[int]:
        return sorted({place for watch in watching for place in watch(step, results) or ()})

    return on_step


def _finish(
    pipe: Any,
    orders: list[Order],
    learned: list[Any],
    checkpoint: Path,
    is_lora: bool,
    overwrite: bool,
    alone: bool,
    following: Any,
) -> list[Exception]:
    """Writes what was learned and says what became of each; those that came to nothing.

    Raises:
        OSError: a file cannot be written; what was learned stays in the checkpoint.
    """
    from keylock_diffusers.training import advice
    from keylock_diffusers.training import training_facts as facts_of

    results, failed = iter(learned), []
    measured = iter(following.measured if following else [{}] * len(learned))
    for order in orders:
        result: Any = order.failure if order.subject is None else next(results)
        followed = {} if order.subject is None else next(measured)
        if not alone:
            print(f"{order.place.name}: {_line(result, is_lora, followed)}")
        if isinstance(result, Exception):
            failed.append(result)
            continue
        try:
            written = _write(pipe, result, order.files, overwrite)
        except OSError as error:
            on = f"what was learned is in {checkpoint}: the same command goes on from there"
            raise OSError(f"{error}; {on if checkpoint.exists() else 'it is lost'}") from error
        if alone:
            print(advice(facts_of(result) if is_lora else result.training))
            if followed:
                course = ", ".join(f"{share:.2f} at step {step}" for step, share in followed.items())
                print(f"Of what other words change in the super-class's pictures, they change here: {course}.")
        for line in written:
            print(line)
    return failed


def _followed(model: str, every: int | None, least: float | None, file: Path | None) -> dict[str, Any]:
    """What `PromptFollowing` is told besides the subjects; nothing if it is not asked for."""
    if every is None and least is None:
        if file is not None:
            raise ValueError("--following-prompts needs --following-every or --least-following")
        return {}
    asked: dict[str, Any] = {"every": every or _FOLLOWING_EVERY, "least": least}
    if file is not None:
        from keylock_diffusers.files import read_text

        asked["prompts"] = [line.strip() for line in read_text(file, 1 << 20).splitlines() if line.strip()]
        if not all(line.count("{}") == 1 for line in asked["prompts"]) or not asked["prompts"]:
            raise ValueError(f"--following-prompts: {file} must hold prompts, one a line, with {{}} once in each")
    elif model == "embedded":
        from keylock_diffusers.embedded.prompts import FOLLOWED

        asked["prompts"] = FOLLOWED
    return asked


def _line(result: Any, is_lora: bool, followed: dict[int, float]) -> str:
    """What became of one user's subject."""
    if isinstance(result, Exception):
        return f"not learned: {result}"
    from keylock_diffusers.training import training_facts as facts_of

    facts = facts_of(result) if is_lora else result.training
    course = facts.get("loss_quarters")
    fell = f", loss {course[0]:.4g} to {course[-1]:.4g}" if course else ""
    follows = f", other words count {list(followed.values())[-1]:.2f}" if followed else ""
    return f"{facts['pictures']} pictures, {facts['steps']} steps, {facts['stopped']}{fell}{follows}"


def _config(model: str, kind: str, given: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> Any:
    """How it is learned.

    Args:
        model: what is trained.
        kind: "lora", "perfusion" or "added".
        given: options by what they belong to; None says nothing.
        others: such that are no part of a configuration.

    Raises:
        ValueError: an option of another kind.
    """
    from keylock_diffusers.demo.story import PERFUSION_TRAINING, TRAINING
    from keylock_diffusers.training import AddedConfig, LoraTrainingConfig, PerfusionConfig
    from keylock_diffusers.training.config import TARGETS

    own = {"all": True} | {name: ("lora" in name) == (kind == "lora") for name in given if name != "all"}
    own |= {name: own[name] and kind in name for name in given if "--edit" in name}
    taken: dict[str, Any] = {}
    for name, belongs in own.items():
        for option, value in (given[name] | others.get(name, {})).items():
            if value is None:
                continue
            if not belongs:
                method = "lora" if kind == "lora" else f"concept, --edit {kind}"
                raise ValueError(f"--{option.replace('_', '-')} is an option of {name}, and --method is {method}")
            if option in given[name]:
                taken[option] = value
    if "targets" in taken and taken["targets"] not in TARGETS:
        taken["targets"] = tuple(name.strip() for name in taken["targets"].split(","))
    embedded = model == "embedded"
    begin: Any
    if kind == "lora":
        begin = LoraTrainingConfig()
        begin = replace(begin, steps=100, learning_rate=2e-3) if embedded else begin
    elif kind == "added":
        begin = TRAINING if embedded else AddedConfig()
    else:
        begin = PERFUSION_TRAINING if embedded else PerfusionConfig()
    return replace(begin, **taken)


def _write(pipe: Any, learned: Any, files: list[Path], overwrite: bool) -> list[str]:
    """What was learned, in its file; and a LoRA's word in one of its own. What is to be said of them, a line each."""
    from keylock_diffusers.concepts import Concept
    from keylock_diffusers.files import write_atomically
    from keylock_diffusers.loras import ModelShapes, write_adapter, write_word

    if isinstance(learned, Concept):
        write_atomically(files[0], learned.to_bytes(), overwrite=overwrite)
        return [f"{files[0]}: {files[0].stat().st_size} bytes, version {learned.version}"]
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(errno.EEXIST, "exists already", str(file))
    write_adapter(files[0], replace(learned, words={}), model=ModelShapes.of(pipe))
    said = [f"{files[0]}: {files[0].stat().st_size} bytes, for pipe.load_lora_weights"]
    for word, file in zip(learned.words.values(), files[1:], strict=True):
        write_word(file, word)
        said.append(f"{file}: {file.stat().st_size} bytes, {word.name}, for pipe.load_textual_inversion")
    return said


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C says where it goes on; the system's SIGTERM is taken for one, in the background too, which has none."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as stopped:
        print(f"keylock: {stopped}" if stopped.args else "keylock: stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _captions(model: str, file: Path | None) -> list[str]:
    if file is not None:
        from keylock_diffusers.files import read_text

        return [line for line in read_text(file, 1 << 26).splitlines() if line.strip()]
    if model != "embedded":
        raise ValueError(
            "--captions must name a text file, a caption a line, for a model of your own: a few thousand captions of "
            "the kind it was trained on"
        )
    from keylock_diffusers.embedded.captions import default_captions

    return default_captions()
