"""Short ways to build a pipeline with adapters and to draw with it, plainly and through generate."""

import numpy as np
import torch
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import Request
from tests.diffusers.compatibility import SIZE, STEPS, Feature, make

# What pictures, of values from 0 to 1, may differ by. No float64 measures it: most of a pipeline's layers are torch's
# own, which round with the batch's size, and every step carries that on. So these are what is promised of grey levels.
ROUNDING = 1 / 255 / 8  # from the plain pipeline's, or drawn alike in another way: an eighth of one
COMPANY = 2 / 255  # in a batch from alone: two
# What tells pictures that have to differ from pictures that rounded otherwise; and where the cause is a weak one.
APART, BARELY_APART = 10 * ROUNDING, 4 * ROUNDING
TEXT = "a cat on blue"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def build(family="SD 1.x", adapters=("base",)):
    pipe, _ = make(family, "text only")
    Feature(adapters=adapters).load(pipe)
    return pipe


def plain(pipe, seed=1, **kwargs):
    kwargs = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "height": SIZE, "width": SIZE, **kwargs}
    out = pipe(TEXT, generator=torch.Generator().manual_seed(seed), output_type="np", **kwargs)
    return torch.as_tensor(out.images[0])


def draw(pipe, requests, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, **kwargs}
    drawn = kd.generate(pipe, requests, output_type="np", **kwargs)
    return [image if isinstance(image, Exception) else torch.as_tensor(image) for image in drawn]


def request(*prompts, seed=1, text=TEXT, **more):
    return Request(text, image_prompts=prompts, seed=seed, guidance_scale=more.pop("guidance_scale", 4.0), **more)
