"""How fast this project's tools are and how much memory they take, beside others that do the same."""

import sphinx_pl  # noqa: F401  Chooses how long threads wait, which is too late once torch is imported.
