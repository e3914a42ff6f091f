"""A user's own penalty: how far the norm of each core is from one."""

import vit_tucker


@vit_tucker.register_penalty("normed_cores")
def normed_cores(model):
    layers = [part for part in model.modules() if isinstance(part, vit_tucker.AttentionModule)]
    cores = [weight for layer in layers for name, weight in layer.factors().items() if name.endswith("core")]
    return sum((core.norm() - 1) ** 2 for core in cores)
