from .objective import Rows
