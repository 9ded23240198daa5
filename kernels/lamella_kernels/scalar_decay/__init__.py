"""The Triton kernels of recurrences whose state decays by one number a head and token: ssd, linear_attention.

    h_t = a_t h_{t-1} + u_t k_t^T        y_t = h_t q_t + D v_t        u_t = dt_t v_t,  h_{t-1} := 0 at a reset

Chunks of L tokens, each one block of tensor-core products; the states between chunks one after the other:

    y_i = sum over j <= i of L_ij (q_i . k_j) u_j + s_i h q_i        dP_ij = L_ij dt_j (dy_i . v_j)
    h' = e h + sum over j of e_j u_j k_j^T                           R = e R' + sum over i of s_i dy_i q_i^T

    dq_i = sum over j <= i of dP_ij k_j + s_i h^T dy_i               du_j = sum over i >= j of L_ij (q_i . k_j) dy_i
    dk_j = sum over i >= j of dP_ij q_i + e_j R'^T u_j                      + e_j R' k_j

L_ij is the product of the decays behind j up to i, s_i that from the chunk's start, e_j that to its end, e that of all;
h is the state before a chunk, R' the gradient of the one after it. With W_ij what the path from j to i contributes to
the loss, the gradient of log a_k is the sum of W_ij over j < k <= i, where h counts as a j and h' as an i: sums alone.

Normalised, y_i is divided by max(sqrt(w_i), |q_i . z_i|), z and w being the states of v = 1 and of v = k = 1: the row
sums of L (q . k) and of L beside what the chunk's start adds. No gradient passes the divisor, so it divides s_i and
L_ij in backward.

Exactness: log2 of the decays are summed in fp64 from the document's start (or the chunk's) and kept as two fp32
numbers, so that differences keep their digits. Exponents between documents are -inf before exp2: a factor of exactly 0.

B batch, T time, C chunk, L token of a chunk (i and j two of them), H head, G group of heads with the same q and k,
K size of a key, V size of a value. Rows of v are [H V], of q and k [G K]; high, fine [B, H, C L] and document [B, C L]
have a place for every token of C chunks; states are [B, C, H, V, K], sums [B, C, H, K + 1]: z and then w.
"""
