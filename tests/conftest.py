"""The tests are of the CPU, in fp32 and float64, also where there is a GPU."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
