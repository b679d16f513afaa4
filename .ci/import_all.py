"""Import every module of the package, so that none is public and broken."""

import importlib
import pkgutil
import sys

import loglik

names = sorted(module.name for module in pkgutil.walk_packages(loglik.__path__, "loglik."))
for name in names:
    importlib.import_module(name)
for name in loglik.__all__:
    getattr(loglik, name)
sys.stdout.write(f"imported {len(names)} modules\n")
