"""Methods that measure the local Lipschitz constant; importing this package registers them."""

from lipbounds.estimators import ascent as ascent
from lipbounds.estimators import autolip as autolip
from lipbounds.estimators import clever as clever
from lipbounds.estimators import exact as exact
from lipbounds.estimators import lanczos as lanczos
from lipbounds.estimators import lanczos_posterior as lanczos_posterior
from lipbounds.estimators import power as power
from lipbounds.estimators import sampling as sampling
from lipbounds.estimators import seqlip as seqlip
from lipbounds.estimators import whole_model as whole_model
from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
