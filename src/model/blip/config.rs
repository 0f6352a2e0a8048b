//! `config.json` of BLIP and BLIP-2. What a file leaves out has transformers' default, which is not the same for both.

use anyhow::{Context as _, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The vision transformer of either (`BlipVisionConfig`, `Blip2VisionConfig`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Width of a patch's vector.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Side of a picture in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Activation of the feed-forward layers.
    pub hidden_act: Act,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
    /// Whether queries, keys and values have a bias; BLIP's always do.
    pub qkv_bias: bool,
}

/// A BERT with cross-attention: BLIP's decoder (`BlipTextConfig`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecoderConfig {
    /// Tokens that can be told apart.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Tokens of the longest text.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward layers.
    pub hidden_act: Act,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
    /// The token that a caption starts with.
    pub bos_token_id: u32,
    /// The token that ends one.
    pub sep_token_id: u32,
    /// How places are told: `absolute`, the only one that is read.
    pub position_embedding_type: String,
}

/// BLIP-2's querying transformer (`Blip2QFormerConfig`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QFormerConfig {
    /// Width of a query.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Every so many layers, the first among them, look at the picture.
    pub cross_attention_frequency: usize,
    /// Activation of the feed-forward layers.
    pub hidden_act: Act,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
    /// How places are told: `absolute`, the only one that is read.
    pub position_embedding_type: String,
}

/// BLIP-2's language model (`OPTConfig`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptConfig {
    /// `opt`, the only one that is read.
    pub model_type: String,
    /// Tokens that can be told apart.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub ffn_dim: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Tokens of the longest text, the picture's among them.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward layers.
    pub activation_function: Act,
    /// The token that a text starts with.
    pub bos_token_id: u32,
    /// The tokens that end one.
    pub eos_token_id: Ids,
    /// Whether the output layer is the table of tokens.
    pub tie_word_embeddings: bool,
    /// Of the variants of OPT those of 350 million parameters and of old files are not read.
    pub do_layer_norm_before: bool,
    /// As above.
    pub enable_bias: bool,
    /// As above.
    pub layer_norm_elementwise_affine: bool,
    /// As above.
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    /// As above; None: `hidden_size`.
    pub word_embed_proj_dim: Option<usize>,
}

/// One token or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Ids {
    /// One.
    One(u32),
    /// Several.
    Many(Vec<u32>),
}

impl Ids {
    /// As a list.
    pub fn to_vec(&self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![*id],
            Self::Many(ids) => ids.clone(),
        }
    }
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// The exact one.
    Gelu,
    /// x·σ(1.702·x).
    QuickGelu,
    /// max(x, 0).
    Relu,
}

/// `config.json` of `BlipForConditionalGeneration`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlipConfig {
    /// The eyes.
    pub vision: VisionConfig,
    /// The writer.
    pub text: DecoderConfig,
}

/// `config.json` of `Blip2ForConditionalGeneration`.
#[derive(Clone, Debug, PartialEq)]
pub struct Blip2Config {
    /// The eyes.
    pub vision: VisionConfig,
    /// What reads them.
    pub qformer: QFormerConfig,
    /// The writer.
    pub text: OptConfig,
    /// Vectors that a picture becomes.
    pub num_query_tokens: usize,
}

impl BlipConfig {
    /// Reads the file's contents.
    pub fn from_json(json: &Value) -> Result<Self> {
        let vision = VisionConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 384,
            patch_size: 16,
            hidden_act: Act::Gelu,
            layer_norm_eps: 1e-5,
            qkv_bias: true,
        };
        let text = DecoderConfig {
            vocab_size: 30524,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: Act::Gelu,
            layer_norm_eps: 1e-12,
            bos_token_id: 30522,
            sep_token_id: 102,
            position_embedding_type: "absolute".into(),
        };
        let config = Self { vision: part(json, "vision_config", &vision)?, text: part(json, "text_config", &text)? };
        check_heads("vision_config", config.vision.hidden_size, config.vision.num_attention_heads)?;
        check_heads("text_config", config.text.hidden_size, config.text.num_attention_heads)?;
        check_positions("text_config", &config.text.position_embedding_type)?;
        Ok(config)
    }
}

impl Blip2Config {
    /// Reads the file's contents.
    pub fn from_json(json: &Value) -> Result<Self> {
        let vision = VisionConfig {
            hidden_size: 1408,
            intermediate_size: 6144,
            num_hidden_layers: 39,
            num_attention_heads: 16,
            image_size: 224,
            patch_size: 14,
            hidden_act: Act::Gelu,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
        };
        let qformer = QFormerConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            cross_attention_frequency: 2,
            hidden_act: Act::Gelu,
            layer_norm_eps: 1e-12,
            position_embedding_type: "absolute".into(),
        };
        let text = OptConfig {
            model_type: "opt".into(),
            vocab_size: 50272,
            hidden_size: 768,
            ffn_dim: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 2048,
            activation_function: Act::Relu,
            bos_token_id: 2,
            eos_token_id: Ids::One(2),
            tie_word_embeddings: true,
            do_layer_norm_before: true,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            remove_final_layer_norm: false,
            word_embed_proj_dim: None,
        };
        let language = json.pointer("/text_config/model_type").and_then(Value::as_str).unwrap_or("opt");
        ensure!(
            language == "opt",
            "text_config.model_type is {language}, and of BLIP-2 only those with OPT are read; take one of these, such as \
             Salesforce/blip2-opt-2.7b"
        );
        let config = Self {
            vision: part(json, "vision_config", &vision)?,
            qformer: part(json, "qformer_config", &qformer)?,
            text: part(json, "text_config", &text)?,
            num_query_tokens: json.get("num_query_tokens").and_then(Value::as_u64).unwrap_or(32) as usize,
        };
        check_heads("vision_config", config.vision.hidden_size, config.vision.num_attention_heads)?;
        check_heads("qformer_config", config.qformer.hidden_size, config.qformer.num_attention_heads)?;
        check_heads("text_config", config.text.hidden_size, config.text.num_attention_heads)?;
        check_positions("qformer_config", &config.qformer.position_embedding_type)?;
        ensure!(config.qformer.cross_attention_frequency > 0, "qformer_config.cross_attention_frequency is 0");
        let opt = &config.text;
        let is_plain = opt.do_layer_norm_before
            && opt.enable_bias
            && opt.layer_norm_elementwise_affine
            && !opt.remove_final_layer_norm
            && opt.word_embed_proj_dim.is_none_or(|width| width == opt.hidden_size);
        ensure!(is_plain, "text_config is a variant of OPT that is not read (norms behind the layers, or projections)");
        Ok(config)
    }
}

/// The part `name` of a config, laid over the defaults; null counts as left out.
fn part<T: Serialize + DeserializeOwned>(json: &Value, name: &str, defaults: &T) -> Result<T> {
    let mut merged = serde_json::to_value(defaults)?.as_object().cloned().unwrap_or_default();
    let empty = Map::new();
    let given = json.get(name).and_then(Value::as_object).unwrap_or(&empty);
    merged.extend(given.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())));
    serde_json::from_value(Value::Object(merged)).with_context(|| name.to_owned())
}

fn check_heads(part: &str, width: usize, heads: usize) -> Result<()> {
    let fits = heads > 0 && width.is_multiple_of(heads);
    ensure!(fits, "{part}: num_attention_heads {heads} does not divide hidden_size {width}");
    Ok(())
}

fn check_positions(part: &str, kind: &str) -> Result<()> {
    ensure!(kind == "absolute", "{part}.position_embedding_type is {kind}, and only absolute is read");
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_left_out_or_null_has_the_default_of_its_model() {
        let config = json!({"vision_config": {"hidden_size": 96, "image_size": null}, "text_config": {}});
        let blip = BlipConfig::from_json(&config).unwrap();
        assert_eq!((blip.vision.hidden_size, blip.vision.image_size, blip.vision.layer_norm_eps), (96, 384, 1e-5));
        assert_eq!((blip.text.bos_token_id, blip.text.num_attention_heads), (30522, 8));
        let blip2 = Blip2Config::from_json(&config).unwrap();
        assert_eq!((blip2.vision.image_size, blip2.num_query_tokens, blip2.text.ffn_dim), (224, 32, 3072));
        let many = json!({"text_config": {"eos_token_id": [7, 9]}});
        assert_eq!(Blip2Config::from_json(&many).unwrap().text.eos_token_id.to_vec(), [7, 9]);
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_name() {
        let message = |config: Value| format!("{:#}", Blip2Config::from_json(&config).unwrap_err());
        assert!(message(json!({"text_config": {"model_type": "t5"}})).contains("blip2-opt-2.7b"));
        assert!(message(json!({"text_config": {"do_layer_norm_before": false}})).contains("variant of OPT"));
        assert!(message(json!({"text_config": {"word_embed_proj_dim": 512}})).contains("variant of OPT"));
        assert!(
            message(json!({"vision_config": {"hidden_act": "swish"}})).starts_with("vision_config: unknown variant")
        );
        assert!(
            message(json!({"qformer_config": {"num_attention_heads": 7}})).contains("qformer_config: num_attention")
        );
        let relative = json!({"qformer_config": {"position_embedding_type": "relative_key"}});
        assert!(message(relative).contains("only absolute"));
    }
}
