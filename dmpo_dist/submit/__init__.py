"""Handing a run to a cluster: Slurm, Ray's Jobs API, Kubernetes with KubeRay.

Each target is a module with ``files`` (rendered, name -> text), ``check`` (before anything is written), ``submit``,
``status``, ``follow`` and ``stop``.
"""
