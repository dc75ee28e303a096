"""Fine-tuning: features of frozen layers computed once; unfreezing layer by layer."""
