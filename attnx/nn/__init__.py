
from attnx.nn.interop import attention_fn as attention_fn
from attnx.nn.norms import SRMSNorm as SRMSNorm
from attnx.nn.rotary import Rotary as Rotary
