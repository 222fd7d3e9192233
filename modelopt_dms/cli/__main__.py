# SPDX-License-Identifier: Apache-2.0
"""`python -m modelopt_dms.cli`, as launchers start it."""

from modelopt_dms.cli import main

main()
