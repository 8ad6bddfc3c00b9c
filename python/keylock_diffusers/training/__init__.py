"""Learning concepts from pictures."""

from keylock_diffusers.training.covariance import Covariance, covariance, default_captions
from keylock_diffusers.training.trainer import ConceptTrainingError, Subject, TrainingConfig, train_concepts

__all__ = [
    "ConceptTrainingError",
    "Covariance",
    "Subject",
    "TrainingConfig",
    "covariance",
    "default_captions",
    "train_concepts",
]
