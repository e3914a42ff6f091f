"""A file or folder per attention method. Every module in here is imported, so that methods register themselves."""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
