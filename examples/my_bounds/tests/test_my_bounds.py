"""The whole contract suite of lipbounds on the bound of this package."""

import my_bounds

from lipbounds.testing import suite_for


test_frobenius = suite_for(my_bounds.FROBENIUS)
