"""One file a paper; importing this package registers every bound."""

from lipbounds.bounds import castin2024 as castin2024
from lipbounds.bounds import centred as centred
from lipbounds.bounds import covariance as covariance
from lipbounds.bounds import yudin2025 as yudin2025
from lipbounds.bounds import yudin2025_ball as yudin2025_ball
