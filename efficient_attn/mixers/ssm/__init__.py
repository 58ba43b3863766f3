"""Linear state-space models as the papers write them: small pure functions, and the layers' common parts.

`hippo` initial matrices; `discretise` from continuous to discrete time; `kernels` recurrences and convolution kernels of dense
systems, and the Vandermonde and Cauchy sums; `systems` the two structured systems, each with both of its forms;
`features` and `scanned` the layers around one system a channel (S4, S4D, DSS) and around one for all of them (S5, LRU);
`paired` the parameters that S4 and S4D share; `inputs` and `activations` what comes before and after every system.
"""
