"""Fine-tuning on MIMIC-IT data with the HF `Trainer`."""
