"""Learning concepts and LoRAs from pictures."""

from keylock_diffusers.denoisers.unet import localization_layers
from keylock_diffusers.training.advice import advice
from keylock_diffusers.training.automatic_masks import attention_masks, clipseg_masks
from keylock_diffusers.training.config import (
    AddedConfig,
    ConceptTrainingError,
    LoraTrainingConfig,
    LoraTrainingError,
    PerfusionConfig,
    Subject,
)
from keylock_diffusers.training.covariance import Covariance, covariance
from keylock_diffusers.training.folder import PictureFolder
from keylock_diffusers.training.following import PromptFollowing
from keylock_diffusers.training.image_adapter import AdapterConfig, AdapterExample, ImageAdapter, train_image_adapter
from keylock_diffusers.training.localization import Localization, localization_loss
from keylock_diffusers.training.loras import train_loras, training_facts
from keylock_diffusers.training.samples import Samples
from keylock_diffusers.training.subject_fusion import (
    FusionConfig,
    FusionExample,
    FusionSubject,
    train_subject_fusion,
)
from keylock_diffusers.training.trainer import train_concepts

__all__ = [
    "AddedConfig",
    "AdapterConfig",
    "AdapterExample",
    "ConceptTrainingError",
    "Covariance",
    "FusionConfig",
    "FusionExample",
    "FusionSubject",
    "ImageAdapter",
    "Localization",
    "LoraTrainingConfig",
    "LoraTrainingError",
    "PerfusionConfig",
    "PictureFolder",
    "PromptFollowing",
    "Samples",
    "Subject",
    "advice",
    "attention_masks",
    "clipseg_masks",
    "covariance",
    "localization_layers",
    "localization_loss",
    "train_concepts",
    "train_image_adapter",
    "train_loras",
    "train_subject_fusion",
    "training_facts",
]
