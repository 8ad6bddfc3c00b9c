"""What requests say as tensors: prompts, regions' wordings, image prompts, subjects."""
