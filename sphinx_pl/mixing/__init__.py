"""Weight mixing: several checkpoints of one model become one (SPHINX, section 3.1: β·θ_real +
(1-β)·θ_syn).
"""
