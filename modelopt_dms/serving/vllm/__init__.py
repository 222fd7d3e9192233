# SPDX-License-Identifier: Apache-2.0
"""DMS in vLLM, through its plug-in system: modelopt_dms installed beside vLLM, then `vllm serve DIR`.

vLLM calls `register` in each of its processes. What belongs to what:

    config.py       a DMS directory -> vLLM's settings, or an error by name
    platform.py     likewise, for the device
    model.py        vLLM's Transformers backend with a gate in every attention layer
    attention.py    the attention backend, and the custom op that carries the decisions
    slabs.py        the KV rows on a worker (no vLLM, as the next three)
    slab_tables.py  which slots the lists of all requests have
    slab_pages.py   which pages each request may use
    drafts.py       tokens that may be taken back
    scheduling.py   spec and manager: what the scheduler reserves
    accounting.py   how many blocks that is (numbers only)
    connector.py    the control channel between the two

vLLM itself is not changed: it is told of a config parser, two model classes, a KV cache spec and a KV connector.
"""

from modelopt_dms.serving.vllm.names import ARCHITECTURES, OLDEST, TOO_NEW


def register() -> None:
    """Tell vLLM about DMS models; the entry point of group `vllm.general_plugins`. May be called again.

    On a version of vLLM that this was not written for, it only warns: other models go on to work, and vLLM refuses DMS
    directories by their quantization method.
    """
    import logging

    import vllm
    from packaging.version import Version

    found = Version(Version(vllm.__version__).base_version)
    if not Version(OLDEST) <= found < Version(TOO_NEW):
        logging.getLogger(__name__).warning(
            "modelopt_dms serves DMS models on vLLM %s up to %s (excluded), not on %s: they will be refused",
            OLDEST,
            TOO_NEW,
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry

    from modelopt_dms.serving.vllm.config import register_configs

    register_configs()
    for architecture, name in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"{__name__}.model:{name}")
