//! `config.json` of a Grounding DINO checkpoint (transformers `GroundingDinoConfig`). What a file leaves out has
//! transformers' own default, for it writes only what differs.

use anyhow::{Result, bail, ensure};
use serde::Deserialize;

/// The whole network.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct GroundingDinoConfig {
    /// The family that transformers knows it by.
    pub model_type: String,
    /// The picture's backbone.
    pub backbone_config: SwinConfig,
    /// The text's encoder.
    pub text_config: BertConfig,
    /// Boxes that come out.
    pub num_queries: usize,
    /// Layers of the feature enhancer.
    pub encoder_layers: usize,
    /// Width inside its feed-forward layers; half of it in those of the text, and in the fusion of both.
    pub encoder_ffn_dim: usize,
    /// Heads of its deformable attention; half as many in text and fusion.
    pub encoder_attention_heads: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Width inside its feed-forward layers.
    pub decoder_ffn_dim: usize,
    /// Heads of its attentions.
    pub decoder_attention_heads: usize,
    /// Inside the feed-forward layers.
    pub activation_function: Activation,
    /// d: width of a token of picture or text.
    pub d_model: usize,
    /// Maps that are attended to: the backbone's, and halved ones below.
    pub num_feature_levels: usize,
    /// Places that a head reads in each map, in the enhancer.
    pub encoder_n_points: usize,
    /// The same in the decoder.
    pub decoder_n_points: usize,
    /// Whether boxes start from the enhancer's proposals.
    pub two_stage: bool,
    /// Tokens of a text at most.
    pub max_text_len: usize,
    /// Whether queries start from learnt vectors.
    pub embedding_init_target: bool,
    /// Whether all layers of the decoder share the head that moves boxes.
    pub decoder_bbox_embed_share: bool,
    /// Whether the proposals share it too.
    pub two_stage_bbox_embed_share: bool,
    /// `sine` or `learned`.
    pub position_embedding_type: String,
    /// Base of the wavelengths of the picture's positions.
    pub positional_embedding_temperature: f64,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
}

impl Default for GroundingDinoConfig {
    fn default() -> Self {
        Self {
            model_type: "grounding-dino".into(),
            backbone_config: SwinConfig::default(),
            text_config: BertConfig::default(),
            num_queries: 900,
            encoder_layers: 6,
            encoder_ffn_dim: 2048,
            encoder_attention_heads: 8,
            decoder_layers: 6,
            decoder_ffn_dim: 2048,
            decoder_attention_heads: 8,
            activation_function: Activation::Relu,
            d_model: 256,
            num_feature_levels: 4,
            encoder_n_points: 4,
            decoder_n_points: 4,
            two_stage: true,
            max_text_len: 256,
            embedding_init_target: true,
            decoder_bbox_embed_share: true,
            two_stage_bbox_embed_share: false,
            position_embedding_type: "sine".into(),
            positional_embedding_temperature: 20.0,
            layer_norm_eps: 1e-5,
        }
    }
}

impl GroundingDinoConfig {
    /// Refuses what this network is not built for.
    pub fn check(&self) -> Result<()> {
        if self.model_type != "grounding-dino" {
            bail!("model_type is {:?}; the detector takes a Grounding DINO checkpoint", self.model_type);
        }
        let (backbone, text) = (&self.backbone_config, &self.text_config);
        let unusual = [
            ("two_stage", !self.two_stage),
            ("embedding_init_target", !self.embedding_init_target),
            ("two_stage_bbox_embed_share", self.two_stage_bbox_embed_share),
            ("position_embedding_type", self.position_embedding_type != "sine"),
            ("backbone_config.model_type", backbone.model_type != "swin"),
            ("backbone_config.use_absolute_embeddings", backbone.use_absolute_embeddings),
            ("text_config.model_type", text.model_type != "bert"),
            ("text_config.position_embedding_type", text.position_embedding_type != "absolute"),
        ];
        if let Some((field, _)) = unusual.iter().find(|(_, is_unusual)| *is_unusual) {
            bail!("{field} is not as in the published Grounding DINO checkpoints (tiny and base), which are supported");
        }
        let divides = |what: &str, width: usize, heads: usize| {
            ensure!(heads > 0 && width.is_multiple_of(heads), "{what}: {heads} heads do not divide a width of {width}");
            Ok(())
        };
        divides("encoder_attention_heads", self.d_model, self.encoder_attention_heads)?;
        divides("half of encoder_attention_heads", self.d_model, self.encoder_attention_heads / 2)?;
        divides("half of encoder_attention_heads", self.encoder_ffn_dim / 2, self.encoder_attention_heads / 2)?;
        divides("decoder_attention_heads", self.d_model, self.decoder_attention_heads)?;
        divides("text_config.num_attention_heads", text.hidden_size, text.num_attention_heads)?;
        ensure!(
            backbone.depths.len() == backbone.num_heads.len(),
            "backbone_config: depths and num_heads differ in length"
        );
        for (stage, &heads) in backbone.num_heads.iter().enumerate() {
            divides("backbone_config.num_heads", backbone.width(stage), heads)?;
        }
        let stages = backbone.out_stages()?;
        ensure!(
            !stages.is_empty() && stages.len() <= self.num_feature_levels && self.num_feature_levels > 1,
            "num_feature_levels {} does not fit a backbone of {} maps",
            self.num_feature_levels,
            stages.len()
        );
        Ok(())
    }
}

/// An activation by transformers' name.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// The exact one.
    Gelu,
}

/// The Swin transformer (transformers `SwinConfig`).
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SwinConfig {
    /// `swin`.
    pub model_type: String,
    /// Pixels a side that become one position.
    pub patch_size: usize,
    /// Channels of a picture.
    pub num_channels: usize,
    /// Width of the first stage; each further one has twice as much.
    pub embed_dim: usize,
    /// Layers a stage.
    pub depths: Vec<usize>,
    /// Heads a stage.
    pub num_heads: Vec<usize>,
    /// Positions a side that attend to each other.
    pub window_size: usize,
    /// Width inside the feed-forward layers, in widths of the stage.
    pub mlp_ratio: f64,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Inside the feed-forward layers.
    pub hidden_act: Activation,
    /// Whether positions are added too.
    pub use_absolute_embeddings: bool,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
    /// The stages whose maps come out, from 1 on.
    pub out_indices: Option<Vec<usize>>,
    /// The same by name.
    pub out_features: Option<Vec<String>>,
}

impl Default for SwinConfig {
    fn default() -> Self {
        Self {
            model_type: "swin".into(),
            patch_size: 4,
            num_channels: 3,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            window_size: 7,
            mlp_ratio: 4.0,
            qkv_bias: true,
            hidden_act: Activation::Gelu,
            use_absolute_embeddings: false,
            layer_norm_eps: 1e-5,
            out_indices: None,
            out_features: None,
        }
    }
}

impl SwinConfig {
    /// Channels of a stage, counted from 0.
    pub fn width(&self, stage: usize) -> usize {
        self.embed_dim << stage
    }

    /// The stages whose maps come out, counted from 0 here; the last one where nothing is said.
    pub fn out_stages(&self) -> Result<Vec<usize>> {
        let count = self.depths.len();
        let mut stages = Vec::new();
        let named = |name: &String| name.strip_prefix("stage").and_then(|number| number.parse().ok());
        let numbers: Vec<Option<usize>> = match (&self.out_features, &self.out_indices) {
            (Some(names), _) => names.iter().map(named).collect(),
            (None, Some(indices)) => indices.iter().copied().map(Some).collect(),
            (None, None) => vec![Some(count)],
        };
        for number in numbers {
            match number {
                Some(number) if (1..=count).contains(&number) => stages.push(number - 1),
                _ => bail!("backbone_config: out_features or out_indices name a stage that is not among the {count}"),
            }
        }
        Ok(stages)
    }
}

/// The text encoder (transformers `BertConfig`).
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct BertConfig {
    /// `bert`.
    pub model_type: String,
    /// Tokens that can be told apart.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Inside the feed-forward layers.
    pub hidden_act: Activation,
    /// Positions that have a vector.
    pub max_position_embeddings: usize,
    /// Kinds of text that have a vector; only the first is used.
    pub type_vocab_size: usize,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
    /// `absolute`.
    pub position_embedding_type: String,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            model_type: "bert".into(),
            vocab_size: 30_522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            position_embedding_type: "absolute".into(),
        }
    }
}
