# SPDX-License-Identifier: Apache-2.0
"""`python -m modelopt_dms`: the command line."""

from modelopt_dms.cli import main

if __name__ == "__main__":
    main()
