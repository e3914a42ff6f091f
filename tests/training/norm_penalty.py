"""A user's own penalty: how far each core's entries are from a norm of one."""

import vit_tucker


@vit_tucker.register_penalty("unit_cores")
def unit_cores(model):
    cores = [parameter for name, parameter in model.named_parameters() if name.endswith("_core")]
    return sum((core.norm() - 1) ** 2 for core in cores)
