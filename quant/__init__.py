"""How few bits it survives: number formats, fake quantization, evaluation and export."""
