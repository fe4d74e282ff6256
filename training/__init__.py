"""How a network learns: loop, engine, data, optimizers, objectives, checkpoints."""

import logging

# transformers imports torchao wherever it is installed; its notices about kernels for other accelerators would open every run.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
