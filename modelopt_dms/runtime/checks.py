# SPDX-License-Identifier: Apache-2.0
"""Whether files and graphs are what their manifest says.

Each check raises an error of its own, before anything is loaded.
"""

from pathlib import Path

from modelopt_dms.runtime.manifest import (
    FILE,
    PHASES,
    EngineError,
    Kernel,
    Manifest,
    ManifestError,
    Port,
    sha256,
)

OLDEST, NEWEST = (10, 10), (11, 99)

# name -> (dtype of torch, shape with -1 where it may vary)
Found = dict[str, tuple[str, tuple[int, ...]]]


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def check_version(version: str) -> None:
    """That a TensorRT can do what we need.

    Raises:
        EngineError: it is too old or too new.
    """
    if not OLDEST <= version_of(version) <= NEWEST:
        raise EngineError(
            f"wrong version: TensorRT {version} is installed, and the plugins need 10.10 .. 11.x; "
            "`pip install 'tensorrt-cu13>=10.10,<12'`"
        )


def check_pages(pages: int, manifest: Manifest) -> None:
    """That one sequence can begin.

    Raises:
        EngineError: it cannot.
    """
    lists = manifest.model.kv_heads
    if pages < lists:
        raise EngineError(
            f"pages={pages} cannot hold one sequence: its {lists} lists of a layer need a page each; give it "
            f"--pages {lists} or more"
        )


def check_files(manifest: Manifest, directory: Path) -> None:
    """That graphs and weights are those that were exported.

    Raises:
        ManifestError: one is missing or changed.
    """
    if manifest.phases.keys() != set(PHASES):
        raise ManifestError(
            f"{directory / FILE}: phases are {sorted(manifest.phases)}, expected {sorted(PHASES)}; export again"
        )
    for phase in manifest.phases.values():
        # Exporters say what they are, and hash what they write.
        if manifest.made_by and phase.graph not in manifest.files:
            raise ManifestError(
                f"{directory / FILE}: files has no hash of {phase.graph}, so that nobody can tell whether it was "
                "changed; export again"
            )
    for name, expected in manifest.files.items():
        _check_file(directory / name, expected)


def check_kernels(manifest: Manifest, directory: Path) -> None:
    """That the kernel files are those that were exported.

    Raises:
        ManifestError: one is missing or changed.
    """
    for kernel in manifest.kernels:
        check_kernel(kernel, directory)


def check_kernel(kernel: Kernel, directory: Path) -> None:
    """That a kernel's file is the one that was exported.

    Raises:
        ManifestError: it is missing or changed.
    """
    _check_file(directory / kernel.file, kernel.sha256, f"the kernel of {kernel.operator}")


def _check_file(path: Path, expected: str, what: str = "") -> None:
    if not path.is_file():
        raise ManifestError(f"{path} is missing{what and f', {what}'}; export again")
    found = sha256(path)
    if found != expected:
        raise ManifestError(
            f"{path} was changed since the export ({path.stat().st_size} bytes): its sha256 is {found[:12]}..., the "
            f"manifest says {expected[:12]}...{what and f' for {what}'}; export again"
        )


def kernel_hashes(kernels: tuple[Kernel, ...]) -> dict[str, str]:
    """What a build writes down about the kernels that it embedded."""
    return {x.operator: x.sha256 for x in kernels}


def check_engine(manifest: Manifest, directory: Path, version: str, capability: str) -> None:
    """That the engine files can be loaded here.

    Args:
        manifest: of the directory.
        directory: that holds them.
        version: of TensorRT.
        capability: of the GPU, such as "9.0".

    Raises:
        EngineError: none was built yet, or by another TensorRT, or for another GPU.
        ManifestError: a file is not the one that was built, or kernels were exported anew.
    """
    build = manifest.build
    if build is None or any(x.engine is None for x in manifest.phases.values()):
        raise EngineError(
            f"no engine was built in {directory} yet; run `modelopt-dms engine build {directory}` on the GPU that "
            "will run it, or use the backend onnxruntime"
        )
    again = f"run `modelopt-dms engine build {directory}` again here"
    if version_of(version) != version_of(build["tensorrt"]):
        raise EngineError(
            f"wrong version: the engine was built with TensorRT {build['tensorrt']}, and {version} is installed; "
            f"install that one, or {again}"
        )
    if capability != build["capability"]:
        raise EngineError(
            f"wrong GPU: the engine was built for compute capability {build['capability']} ({build['gpu']}), "
            f"and this GPU has {capability}; {again}"
        )
    if build["kernels"] != kernel_hashes(manifest.kernels):
        raise ManifestError(
            f"{directory} was exported again after its engine was built: the kernels differ; {again}"
        )
    for phase in manifest.phases.values():
        path = directory / str(phase.engine)
        if not path.is_file():
            raise ManifestError(f"{path} is missing; {again}")
        if sha256(path) != phase.engine_sha256:
            raise ManifestError(
                f"{path} is truncated or changed ({path.stat().st_size} bytes): its sha256 is not the one that the "
                f"build wrote down; {again}"
            )


def check_ports(what: str, ports: tuple[Port, ...], found: Found) -> None:
    """That a graph or an engine takes and gives what the manifest says.

    Args:
        what: for the message, such as "decode.engine, inputs".
        ports: of the manifest.
        found: in the graph or the engine.

    Raises:
        ManifestError: names, dtypes or shapes differ.
    """
    names = {x.name for x in ports}
    if names != set(found):
        missing, more = sorted(names - set(found)), sorted(set(found) - names)
        raise ManifestError(
            f"{what}: engine and manifest differ: missing {missing[:3]}, unexpected {more[:3]}; export again"
        )
    for port in ports:
        dtype, shape = found[port.name]
        fits = len(shape) == len(port.shape) and all(
            isinstance(want, str) or have in (-1, want)
            for have, want in zip(shape, port.shape, strict=True)
        )
        if dtype != port.dtype or not fits:
            raise ManifestError(
                f"{what}: engine and manifest differ: {port.name} is {dtype} {list(shape)}, expected {port.dtype} "
                f"{list(port.shape)}; export again"
            )
