# SPDX-License-Identifier: Apache-2.0
"""One HTML file about a DMS model: what it forgot, where, and what that bought."""

# What `compress` calls the one beside a model.
PAGE = "report.html"
