"""What every forked process shares, imported once. It lives to the end: no process's collector need walk through it, and
so copy it."""

import gc
from importlib import import_module

gc.disable()
for _name in (
    "deepspeed",
    "torch._dynamo.repro.after_aot",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "workers.steps",
    "workers.traced",
    "fastrot.cli",
    "fastrot.commands.train",
    "fastrot.data.decode.turbo",
    "fastrot.engine.deepspeed",
    "fastrot.engine.plain",
    "fastrot.runs.run",
    "fastrot.runs.finetune",
):
    import_module(_name)
gc.freeze()
gc.enable()
