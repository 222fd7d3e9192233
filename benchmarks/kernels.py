# SPDX-License-Identifier: Apache-2.0
"""The kernels one by one; see `measure_kernels`.

    python benchmarks/kernels.py --output benchmarks/results/kernels.json
    python benchmarks/kernels.py --quick --output kernels.json      # rehearsal on a CPU, seconds

transformers looks for Hugging Face's package of this name, and imports this file where a benchmark is run: so it
imports nothing itself.
"""

if __name__ == "__main__":
    import signal

    from measure_kernels import main

    # In the background of a shell, interrupts are ignored; h200.sh ends a run by one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
