//! Differentiable operations, channel-last: pictures are `[b, h, w, c]`, tokens `[b, l, c]`. Every one has gradients
//! for all its inputs (Candle's own fused ones lose them). On the CPU they are custom operations in f32 or f64; on
//! other devices compositions of Candle's differentiable primitives.
