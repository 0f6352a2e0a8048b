//! What a caption says of a toybox picture: the kind and the scene, never the looks.

use super::{Kind, Scene};

/// Number of wordings that [`caption`] knows.
pub const WORDINGS: usize = 6;

/// A caption in one of [`WORDINGS`] wordings (taken modulo their number).
pub fn caption(kind: Kind, scene: Scene, wording: usize) -> String {
    let (article, name, place) = (kind.article(), kind.name(), scene.phrase());
    match wording % WORDINGS {
        0 => format!("a photo of {article} {name} {place}"),
        1 => format!("{article} {name} {place}"),
        2 => format!("a picture of {article} {name} {place}"),
        3 => format!("a toy {name} {place}"),
        4 => format!("{place}, {article} {name}"),
        _ => format!("a photo of the {name} {place}"),
    }
}
