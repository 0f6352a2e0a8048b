//! The sets of each step, and the share of them that is computed here.

use std::ops::Range;

use anyhow::Result;

use super::share::Share;
use crate::data::{Fed, Feed};
use crate::shape::SetShape;

/// What an objective is fed with.
pub struct SharedFeed {
    feed: Feed,
    share: Share,
}

impl SharedFeed {
    /// The whole of every batch.
    pub fn new(feed: Feed) -> Self {
        Self { feed, share: Share::WHOLE }
    }

    /// Where the sets come from.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// What is computed of every batch.
    pub fn share(&self) -> Share {
        self.share
    }

    /// Computes no more than this share of every batch from now on.
    pub fn set_share(&mut self, share: Share) {
        self.share = share;
    }

    /// Reads ahead for this share alone as well; all that follow must be parts of it.
    pub fn set_rank_share(&mut self, own: Share) {
        self.feed.set_rank(own.index, own.count);
        self.share = own;
    }

    /// Sets in the batch of `step`, and images in each.
    pub fn shape(&mut self, step: u64) -> SetShape {
        self.feed.plan(step).shape
    }

    /// The share's sets of the batch of `step`, and their places in it.
    pub fn sets(&mut self, step: u64) -> Result<(Range<usize>, Vec<Fed>)> {
        let own = self.share.range(self.shape(step).sets);
        let sets = self.feed.sets(step, own.clone())?;
        Ok((own, sets))
    }
}
