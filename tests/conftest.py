# SPDX-License-Identifier: Apache-2.0
"""Settings that all tests share."""

import hypothesis

# A loaded two-core machine is no reason to fail; failures are printed with the lines that repeat them.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("tests")
