"""Does it personalise well? A benchmark whose right answers are known: ``make quality``."""
