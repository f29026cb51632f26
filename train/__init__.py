"""Training: layout of spans, the self-distillation objective, a thin transformers Trainer, the demonstration task."""
