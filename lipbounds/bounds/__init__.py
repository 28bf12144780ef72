"""One file a paper; importing this package registers every bound."""

from lipbounds.bounds import castin2024 as castin2024
from lipbounds.bounds import centred as centred
from lipbounds.bounds import covariance as covariance
from lipbounds.bounds import covariance_token as covariance_token
from lipbounds.bounds import emadi2026 as emadi2026
from lipbounds.bounds import havens2024 as havens2024
from lipbounds.bounds import hu2024 as hu2024
from lipbounds.bounds import newhouse2025 as newhouse2025
from lipbounds.bounds import vuckovic2020 as vuckovic2020
from lipbounds.bounds import yudin2025 as yudin2025
from lipbounds.bounds import yudin2025_ball as yudin2025_ball
