"""The portable form of a pruned model: safetensors and JSON, without pickle."""
