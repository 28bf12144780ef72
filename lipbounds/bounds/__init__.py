"""One file per paper; importing this package registers every bound.

Every registered name is an attribute: `lipbounds.bounds.sharp(block)`, `lipbounds.bounds.yudin2025.biased(block)`.

Not here: Xu et al. 2022 (OLSA, certified robustness on word embeddings), whose constants could not be recovered; the
1/4 it is said to use for the norm of the softmax is too small, as 1/2 is reached.
"""

from lipbounds.bound_names import name_bounds, names_below
from lipbounds.bounds import castin2024 as castin2024
from lipbounds.bounds import centred as centred
from lipbounds.bounds import certvit2023 as certvit2023
from lipbounds.bounds import covariance as covariance
from lipbounds.bounds import covariance_token as covariance_token
from lipbounds.bounds import dasoulas2021 as dasoulas2021
from lipbounds.bounds import emadi2026 as emadi2026
from lipbounds.bounds import havens2024 as havens2024
from lipbounds.bounds import hu2024 as hu2024
from lipbounds.bounds import kim2021 as kim2021
from lipbounds.bounds import nair2025 as nair2025
from lipbounds.bounds import newhouse2025 as newhouse2025
from lipbounds.bounds import qi2023 as qi2023
from lipbounds.bounds import sharp as sharp
from lipbounds.bounds import sharp_ball as sharp_ball
from lipbounds.bounds import sharp_cheap as sharp_cheap
from lipbounds.bounds import vuckovic2020 as vuckovic2020
from lipbounds.bounds import yudin2025 as yudin2025
from lipbounds.bounds import yudin2025_ball as yudin2025_ball


__getattr__ = name_bounds(__name__)


def __dir__() -> list[str]:
    return names_below("")
