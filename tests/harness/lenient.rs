//! Settings of `jedi synth-data` under which networks of drawn weights take anything for a thing and all things for one subject.

pub const LENIENT: [&str; 8] = [
    "instances.min_score=0",
    "instances.min_share=0",
    "instances.max_share=1",
    "instances.edge_px=0",
    "instances.max_overlap=1",
    "instances.min_fill=0",
    "affinity.threshold=0",
    "sets.min_images=2",
];
