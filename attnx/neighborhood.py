"""What a neighborhood costs: `print(attnx.neighborhood.simulate((256, 256), 80))`."""

from attnx.softmax.neighborhood import Window1D as Window1D
from attnx.softmax.neighborhood import windows as windows
from attnx.softmax.simulate import Simulation as Simulation
from attnx.softmax.simulate import best_tile as best_tile
from attnx.softmax.simulate import perfect as perfect
from attnx.softmax.simulate import simulate as simulate
